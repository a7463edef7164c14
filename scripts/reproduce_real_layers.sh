#!/usr/bin/env bash
# The real-speech tables for layer removal and early exit: Whisper base's encoder with CTC on arctic_en, with layers removed, with early
# exit at many thresholds, and with both combined with downsampling. Needs EFFICIENT_ASR_DATA (arctic_en, ljspeech,
# librispeech_test_other) and EFFICIENT_ASR_MODELS (whisper-base). About two hours on 2 CPU cores. Restartable.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${EFFICIENT_ASR_DATA:?set it to the folder of the development speech}"
: "${EFFICIENT_ASR_MODELS:?set it to the folder that holds whisper-base}"
source scripts/setup.sh
source recipes/early_exit/sweep.sh

run base_finetune_ctc finetune_ctc real/whisper_base
run base_early_exit early_exit real/early_exit
for layers in first_5 first_4 first_3 least_redundant_5 least_redundant_4 least_redundant_3; do
    run "base_layer_removal_$layers" layer_removal real/layer_removal --kept_layers "$layers"
done
run base_downsampling_average_x2 downsampling real/base_downsampling --downsampling_technique average --frames_per_state 2
run base_downsampled_early_exit early_exit real/downsampled_early_exit
run base_downsampled_layer_removal_first_5 layer_removal real/downsampled_layer_removal --kept_layers first_5

# The thresholds give mean exit layers of about 5.8, 5.5, 5 and 4 on the validation split (recipes/early_exit/sweep.py --calibrate_mean_layer).
for split in arctic_en ljspeech librispeech_test_other; do
    exits() { # exits <experiment> <rule> <threshold ...>
        sweep "$1" "output/$1/1986/model" "data/real_arctic/$split.jsonl" "${@:2}" --corpus arctic-dev --repeats 2
    }
    exits base_early_exit entropy 0.13 0.15 0.18 0.25
    exits base_early_exit similarity 0.927 0.9256 0.9238 0.921
    exits base_early_exit confidence -0.055 -0.07 -0.085 -0.12
    exits base_downsampled_early_exit entropy 0.33 0.41 # mean layers 5.5 and 4.5
done
report
