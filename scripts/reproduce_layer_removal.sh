#!/usr/bin/env bash
# The rows for layer removal, layer drop and small models of arXiv 2303.06740 on LibriSpeech train-clean-100. Needs a GPU.
# Restartable: a run that has its result is not run again, one that was interrupted goes on. Further arguments go to every run.
#
#   bash scripts/reproduce_layer_removal.sh /corpora/LibriSpeech [--lm_path 4gram.arpa] [--key value ...]
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -ge 1 ] || { echo "usage: $0 LIBRISPEECH_FOLDER [--key value ...]" >&2; exit 2; }
DATA=$1
shift
source scripts/setup.sh

run() { # run <recipe> <experiment> [--key value ...]
    local recipe=$1 experiment=$2
    shift 2
    if [ -f "results/runs/$experiment.json" ] || [ -f "results/runs/$experiment-test-other.json" ]; then # its last split
        echo "== $experiment is done"
        return
    fi
    echo "== $experiment"
    "$PYTHON" "recipes/$recipe/train.py" "hparams/$recipe.yaml" --data_folder "$DATA" --experiment "$experiment" "$@"
}

for layers in 24 22 20 18 16 14 12; do
    run layer_removal "layer_removal_first_$layers" --kept_layers "first_$layers" "$@"
done
# Layer drop measures the model with all its layers, trained above.
for p in 0.5 0.4 0.3 0.25 0.2; do
    run layer_removal "layer_drop_$p" --kept_layers first_24 --output_folder output/layer_removal_first_24/1986 --test_only True \
        --test_layerdrop "$p" --variant "layerdrop $p" "$@"
done
# The small models are settings of the baseline's recipe.
run finetune_ctc distilhubert_linear --source ntu-spml/distilhubert --head_block none --number_of_epochs 20 \
    --variant "distilhubert linear" "$@"
run finetune_ctc distilhubert_bilstm --source ntu-spml/distilhubert --head_block bilstm --head_layers 2 --head_dropout 0.2 \
    --number_of_epochs 20 --variant "distilhubert bilstm" "$@"
run finetune_ctc filterbanks --features fbank --variant "filterbank front end" "$@"
"$PYTHON" scripts/report.py
