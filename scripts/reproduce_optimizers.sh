#!/usr/bin/env bash
# AdamW, Adagrad and Adafactor with the same budget: Whisper tiny learns German (kerstin_de) and Italian (Asterisk's prompts), two seeds
# each; WER in the language and in English, before and after; loss and WER over steps. Needs EFFICIENT_ASR_DATA and EFFICIENT_ASR_MODELS
# (whisper-tiny); fetches the Italian prompts with apt-get. Restartable; about 1.5 hours on 2 CPU cores. Options are passed to every
# training: bash scripts/reproduce_optimizers.sh --number_of_epochs 60. TARGETS=de trains only German.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${EFFICIENT_ASR_DATA:?set it to the folder of the development speech}"
: "${EFFICIENT_ASR_MODELS:?set it to the folder that holds whisper-tiny}"
source scripts/setup.sh
source recipes/clsr/data.sh
OUT=${OUT:-output/optimizers}

train() { # train <folder> <target> [--key value ...]
    local folder=$OUT/$1 yaml=real/finetune_whisper
    [ "$2" = de ] || yaml=real/finetune_whisper_$2
    shift 2
    compgen -G "$folder/results/*-english.json" >/dev/null ||
        "$PYTHON" recipes/finetune_whisper/train.py "hparams/$yaml.yaml" --device cpu --output_folder "$folder" "$@"
}

for target in ${TARGETS:-de it}; do
    [ "$target" = de ] || asterisk_prompts "$target"
    train "$target/before" "$target" --test_only True --experiment before --variant whisper-tiny
    folders=()
    for seed in ${SEEDS:-1986 1987}; do
        for optimizer in adamw adagrad adafactor; do
            train "$target/$optimizer/$seed" "$target" --optimizer "$optimizer" --seed "$seed" "$@"
            folders+=("$OUT/$target/$optimizer/$seed")
        done
    done
    "$PYTHON" recipes/finetune_whisper/compare.py "${folders[@]}" --before "$OUT/$target/before" --out "results/optimizers/$target.json"
done
"$PYTHON" scripts/report.py
