#!/usr/bin/env bash
# The real-speech tables for layer removal and early exit: Whisper base's encoder with CTC on arctic_en, fewer layers, early exit at
# many thresholds, and both stacked with downsampling. Wants EFFICIENT_ASR_DATA (arctic_en, ljspeech, librispeech_test_other) and
# EFFICIENT_ASR_MODELS (whisper-base). About two hours on 2 CPU cores. Restartable.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${EFFICIENT_ASR_DATA:?set it to the folder of the development speech}"
: "${EFFICIENT_ASR_MODELS:?set it to the folder that holds whisper-base}"
source scripts/setup.sh
LAST_SPLIT=librispeech_test_other
SPLITS="arctic_en ljspeech librispeech_test_other"

sweep() { # sweep <experiment> <label> <rule> <threshold ...>
    local experiment=$1 label=$2 rule=$3
    shift 3
    for split in $SPLITS; do
        if [ -f "results/runs/${experiment}_${label// /_}${rule}_$1-$split.json" ]; then
            echo "== $experiment, $rule on $split is done"
            continue
        fi
        "$PYTHON" scripts/sweep.py "output/$experiment/1986/model" --manifest "data/real_arctic/$split.jsonl" --rule "$rule" \
            --thresholds "$@" --out results/runs --experiment "$experiment" --label "$label" --corpus arctic-dev
    done
}

run base_finetune_ctc finetune_ctc real/whisper_base
run base_early_exit early_exit real/early_exit
for layers in first_5 first_4 first_3 least_redundant_5 least_redundant_4 least_redundant_3; do
    run "base_layer_removal_$layers" layer_removal real/layer_removal --kept_layers "$layers"
done
run base_downsampling_average_x2 downsampling real/base_downsampling --downsampling_technique average --frames_per_state 2
run base_downsampled_early_exit early_exit real/downsampled_early_exit --variant "average x2 + full depth"
run base_downsampled_layer_removal_first_5 layer_removal real/downsampled_layer_removal --kept_layers first_5
