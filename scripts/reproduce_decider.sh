#!/usr/bin/env bash
# Routing between two Whispers per utterance (arXiv 2309.12712) on real speech, from label extraction to tables and plots. Needs
# EFFICIENT_ASR_DATA and EFFICIENT_ASR_MODELS. Restartable: finished steps are skipped. About four hours on 2 CPU cores.
#
#   bash scripts/reproduce_decider.sh [tiny base] [tiny small]      # model pairs (default: both)
#   bash scripts/reproduce_decider.sh /corpora/cv-corpus-7.0-2021-07-21/en    # with the paper's data and models
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh
source recipes/decider/label.sh
ROUTING=output/routing MANIFESTS=data/routing/manifests
TESTS="arctic_en arctic_en_noisy test_other test_other_noisy ljspeech ljspeech_noisy"

if [ -d "${1:-}" ]; then # the paper's setting: Common Voice, tiny and small, the large encoder first
    "$PYTHON" -c 'import sys; from pathlib import Path; from efficient_asr.corpora import prepare_corpus
prepare_corpus("common_voice", sys.argv[1], Path("data/common_voice"), {"language": "en"})' "$1"
    SMALL=${SMALL:-openai/whisper-tiny} LARGE=${LARGE:-openai/whisper-small} ROUTING=output/routing_common_voice
    # States of half a million windows would take 15 TB, so they are computed during decider training.
    label tiny "$SMALL" whisper data/common_voice none $ROUTING train dev test
    label small "$LARGE" whisper data/common_voice none $ROUTING train dev test
    run decider decider decider --data_folder "$1" --small "$SMALL" --large "$LARGE" --labels_folder $ROUTING/labels \
        --states_folder null
    "$PYTHON" recipes/decider/compare.py --pair tiny small --models "$SMALL" "$LARGE" --manifests data/common_voice --tests test \
        --labels $ROUTING/labels --corpus common_voice --deciders output/decider/1986/model \
        --out results/routing/common_voice-tiny-small.json
    exit
fi

: "${EFFICIENT_ASR_DATA:?set it to the folder of real speech}" "${EFFICIENT_ASR_MODELS:?set it to the folder of the Whisper models}"
TRAIN=${TRAIN:-train} # or train_half, train_eighth
LABEL_OPTIONS="--max_tokens_per_s 8" # as in hparams/real/decider.yaml
mix() { # mix <manifest> <part> <out> [options]: make a noisy copy unless it exists
    [ -f "data/routing/$3/manifest.jsonl" ] || "$PYTHON" scripts/mix_noise.py "$EFFICIENT_ASR_DATA/$1/manifest.jsonl" --part "$2" \
        --noise "$EFFICIENT_ASR_DATA/noise_esc10/manifest.jsonl" --rir "$EFFICIENT_ASR_DATA/rir/manifest.jsonl" \
        --out "data/routing/$3" "${@:4}"
}
mix arctic_en train arctic_train_noisy --split train --count 450
mix arctic_en train arctic_dev_noisy --split dev
mix kerstin_de train de_dev_noisy --split dev
mix arctic_en test arctic_test_noisy --split test
mix librispeech_test_other test test_other_noisy
mix ljspeech test ljspeech_noisy
"$PYTHON" - <<'PY'
from pathlib import Path
from efficient_asr.settings.yaml import load_hparams
from efficient_asr.training.data import prepare_splits
prepare_splits(load_hparams(Path("hparams/real/decider.yaml"), {"router_input": "audio"})[0])
PY

# compare <small> <large>: label, train four kinds of deciders with three seeds each, and make the table and the plot.
compare() {
    local small=$1 large=$2 deciders=()
    for name in "$small" "$large"; do
        # shellcheck disable=SC2086
        label "$name" "$EFFICIENT_ASR_MODELS/whisper-$name" whisper $MANIFESTS unpadded $ROUTING $TESTS dev "$TRAIN"
    done
    for router_input in encoder transcript audio large_encoder; do
        for seed in ${SEEDS:-1986 1987 1988}; do
            local output=output/decider_${small}_${large}_$router_input/$seed
            deciders+=("$output/model")
            [ -f "$output/model/config.json" ] || "$PYTHON" recipes/decider/train.py hparams/real/decider.yaml --seed "$seed" \
                --router_input "$router_input" --small_name "$small" --large_name "$large" --train_split "$TRAIN" --train_only True
        done
    done
    # shellcheck disable=SC2086
    "$PYTHON" recipes/decider/compare.py --pair "$small" "$large" --tests $TESTS --deciders "${deciders[@]}" --states $ROUTING/states \
        --models "$EFFICIENT_ASR_MODELS/whisper-$small" "$EFFICIENT_ASR_MODELS/whisper-$large" \
        --out "results/routing/$small-$large.json"
}

if [ $# -eq 0 ]; then set -- tiny base tiny small; fi
while [ $# -gt 1 ]; do
    compare "$1" "$2"
    shift 2
done
"$PYTHON" scripts/report.py
