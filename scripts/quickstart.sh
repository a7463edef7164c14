#!/usr/bin/env bash
# The whole project in miniature: fine-tune a small encoder with CTC on the synthetic mini corpus, run it on downsampled
# input in three ways, take a layer out in two ways, let easy utterances leave early; measure everything alike, print the
# table, draw the plot. Under fifteen minutes on 2 CPU cores after the installation. Restartable: what is done is not done again. RESULTS=folder writes the results elsewhere.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh
RESULTS=${RESULTS:-output/quickstart/runs}

run() { # run <experiment> <recipe> <yaml> [--key value ...]
    local experiment=$1
    shift
    if [ -f "$RESULTS/$experiment.json" ]; then
        echo "== $experiment is done: $RESULTS/$experiment.json"
    else
        echo "== $experiment"
        "$PYTHON" "$@" --results_folder "$RESULTS"
    fi
}

run mini_finetune_ctc recipes/finetune_ctc/train.py hparams/mini/finetune_ctc.yaml
for technique in signal average convolutional; do
    run "mini_downsampling_${technique}_x2" recipes/downsampling/train.py hparams/mini/downsampling.yaml \
        --downsampling_technique "$technique" --downsampling_factor 2
done
for layers in first_3 least_redundant_3; do
    run "mini_layer_removal_$layers" recipes/layer_removal/train.py hparams/mini/layer_removal.yaml --kept_layers "$layers"
done
run mini_early_exit recipes/early_exit/train.py hparams/mini/early_exit.yaml
"$PYTHON" scripts/report.py --runs "$RESULTS"
echo "results: $RESULTS; a model to try: $PYTHON scripts/transcribe.py output/mini_finetune_ctc/1986/model data/mini/audio/test-00000.flac"
