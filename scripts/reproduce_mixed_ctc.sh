#!/usr/bin/env bash
# CTC on easy and hard utterances: strings of spoken digits, and read sentences. Early exit, downsampling and layer removal are trained
# alike, and timed together; do that on a quiet machine. Needs EFFICIENT_ASR_DATA (arctic_en, librispeech_unlabelled, ljspeech, fsdd;
# beside it models/whisper_base_ctc, from which the trainings continue). About eleven hours on two CPU cores. Restartable.
# FROZEN=1 adds the models with frozen lower layers, from the model of reproduce_english_ctc.sh; another hour.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${EFFICIENT_ASR_DATA:?set it to the folder of the development speech}"
source scripts/setup.sh
source recipes/early_exit/sweep.sh
DIGITS=$PWD/data/digit_strings

# digits <folder> [option]: make strings of 3 to 8 digits; no speaker is in two of the splits; the options are those of train.
digits() {
    local folder=$1 part
    shift
    for part in "train --seed 1 $*" "dev --seed 2 --count 40" "test --seed 3"; do
        # shellcheck disable=SC2086
        [ -f "$folder/${part%% *}/manifest.jsonl" ] || "$PYTHON" scripts/join_utterances.py "$EFFICIENT_ASR_DATA/fsdd/manifest.jsonl" \
            --split $part --out "$folder/${part%% *}"
    done
}

# mixed <experiment> <recipe> <yaml> <digit strings> [--key value ...]: train and evaluate; times are measured at the end.
mixed() {
    run "$1" "$2" "real/$3" --digit_strings "$4" --measure_runtime False "${@:5}"
}

# compare <name> <system> ... -- <test set> ...: WER of systems, MACs, and times of TIMED utterances of each set (all) in ROUNDS (3).
compare() {
    local name=$1 compared=() manifests=() set
    shift
    while [ "$1" != -- ]; do
        compared+=("$1")
        shift
    done
    shift
    for set in "$@"; do manifests+=("data/real_mixed_3/$set.jsonl"); done
    "$PYTHON" -m efficient_asr compare "${compared[@]}" --timed "${TIMED:-100}" --rounds "${ROUNDS:-3}" --out "results/compared/$name.json" \
        --manifest "${manifests[@]}"
}

if [ -n "${FROZEN:-}" ]; then
    digits "$DIGITS"
    mixed mixed_ctc finetune_ctc mixed_ctc "$DIGITS" --variant "frozen lower layers"
    mixed mixed_early_exit early_exit mixed_early_exit "$DIGITS" --variant "entropy, frozen lower layers"
fi

digits "${DIGITS}_3" --passes 3
mixed mixed_free_early_exit early_exit mixed_free_early_exit "${DIGITS}_3"
# Thresholds that cost nothing on the validation split (recipes/early_exit/sweep.py, --calibrate_wer_loss_percent 0).
systems=()
exits "full depth" mixed_free_early_exit --rule none
exits entropy mixed_free_early_exit --rule entropy --threshold 0.0869
exits "entropy, two heads" mixed_free_early_exit --rule entropy --threshold 0.1258 --patience 2
exits agreement mixed_free_early_exit --rule agreement --threshold 0.0308
TIMED=16 compare mixed_early_exit "${systems[@]}" -- digit_strings arctic_en ljspeech

# The heads from there, with every digit nine times, more speeds and noise; the other families from the same start as
# mixed_free_early_exit, on the same data and for as many passes.
digits "${DIGITS}_9" --passes 9
mixed mixed_low_early_exit early_exit mixed_low_early_exit "${DIGITS}_9"
mixed mixed_free_ctc finetune_ctc mixed_free_ctc "${DIGITS}_3"
families=("all layers=output/mixed_free_ctc/1986/model" "all layers, with heads=output/mixed_free_early_exit/full depth")
for technique in average signal convolutional; do
    name=mixed_downsampling_${technique}_x2
    mixed "$name" downsampling mixed_downsampling "${DIGITS}_3" --downsampling_technique "$technique"
    families+=("$technique x2=output/$name/1986/model")
done
name=mixed_downsampling_signal_x2_one_frame # without the upsampling by two of the others
mixed "$name" downsampling mixed_downsampling "${DIGITS}_3" --downsampling_technique signal --frames_per_state 1 --experiment "$name" \
    --variant "signal x2, one frame"
families+=("signal x2, one frame=output/$name/1986/model")
name=mixed_downsampling_signal_x3
mixed "$name" downsampling mixed_downsampling "${DIGITS}_3" --downsampling_technique signal --downsampling_factor 3
families+=("signal x3=output/$name/1986/model")
mixed mixed_layer_removal_first_4 layer_removal mixed_layer_removal "${DIGITS}_3"
families+=("first 4 layers=output/mixed_layer_removal_first_4/1986/model")
# 0.21: the most that is saved without an error more on the validation split, with a head on layer 4 alone (recipes/early_exit/sweep.py).
systems=()
exits "early exit, full depth" mixed_low_early_exit --rule none --layers 6
exits "early exit, entropy 0.21" mixed_low_early_exit --rule entropy --threshold 0.2101 --layers 4
exits "early exit, entropy 0.08" mixed_low_early_exit --rule entropy --threshold 0.08 --layers 4
compare mixed_digits "${systems[@]}" -- digit_strings
TIMED=20 ROUNDS=5 compare mixed_families "${families[@]}" "${systems[@]}" -- digit_strings arctic_en ljspeech
report
