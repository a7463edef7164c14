#!/usr/bin/env bash
# Routing between two Whispers per utterance (arXiv 2309.12712) on real speech, from label extraction to tables and plots. Needs
# EFFICIENT_ASR_DATA and EFFICIENT_ASR_MODELS. Restartable: finished steps are skipped. About four hours on 2 CPU cores.
#
#   bash scripts/reproduce_decider.sh [tiny base] [tiny small]      # model pairs (default: both)
#   OWN_LENGTH=1 bash scripts/reproduce_decider.sh                  # the same models with silence cache and int8 decoder: one hour
#   bash scripts/reproduce_decider.sh /corpora/cv-corpus-7.0-2021-07-21/en [--key value ...]     # with the paper's data and models;
#       WORK=FOLDER keeps everything there (labels, decider, table); SMALL and LARGE are other models
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh
source recipes/decider/label.sh
ROUTING=output/routing MANIFESTS=data/routing/manifests
TESTS="arctic_en arctic_en_noisy test_other test_other_noisy ljspeech ljspeech_noisy"

COMMON_VOICE=$(absolute "${1:-}")
if [[ "${1:-}" == */* && ! -d "$COMMON_VOICE" ]]; then
    echo "error: $1 is not a folder; give Common Voice's folder of one language, or pairs of models such as: tiny base" >&2
    exit 2
fi
if [ -d "$COMMON_VOICE" ]; then # the paper's setting: Common Voice, tiny and small, the large encoder first
    DATA=$COMMON_VOICE OUT=${WORK:-results/routing}
    LABELS=${WORK:-output/routing_common_voice} CV=${WORK:+$WORK/manifests} DECIDER=${WORK:+$WORK/decider}
    CV=${CV:-data/common_voice} DECIDER=${DECIDER:-output/decider/1986}
    shift
    if [[ " $* " == *" --output_folder"* ]]; then
        echo "error: set WORK instead of --output_folder" >&2
        exit 2
    fi
    "$PYTHON" -c 'import sys; from pathlib import Path; from efficient_asr.corpora import prepare_corpus
prepare_corpus("common_voice", sys.argv[1], Path(sys.argv[2]), {"language": "en"})' "$DATA" "$CV"
    SMALL=${SMALL:-openai/whisper-tiny} LARGE=${LARGE:-openai/whisper-small}
    # States of half a million windows would take 15 TB, so they are computed during decider training.
    label tiny "$SMALL" whisper "$CV" none "$LABELS" train dev test
    label small "$LARGE" whisper "$CV" none "$LABELS" train dev test
    run decider decider decider --data_folder "$DATA" --prepared_folder "$CV" --small "$SMALL" --large "$LARGE" \
        --labels_folder "$LABELS/labels" --states_folder null --output_folder "$DECIDER" "$@"
    "$PYTHON" recipes/decider/compare.py --pair tiny small --models "$SMALL" "$LARGE" --manifests "$CV" --tests test \
        --labels "$LABELS/labels" --corpus common_voice --deciders "$DECIDER/model" --out "$OUT/common_voice-tiny-small.json"
    exit
fi

: "${EFFICIENT_ASR_DATA:?set it to the folder of real speech}" "${EFFICIENT_ASR_MODELS:?set it to the folder of the Whisper models}"
TRAIN=${TRAIN:-train} # or train_half, train_eighth
INPUTS=(encoder transcript audio large_encoder) FRAMES=unpadded MODELS=$EFFICIENT_ASR_MODELS/whisper- TABLE="" CORPUS=routing-dev
LABEL_OPTIONS="--max_tokens_per_s 8" # as in hparams/real/decider.yaml
if [ -n "${OWN_LENGTH:-}" ]; then
    # The large encoder's states of all utterances would take 6 GB, and running it first does not pay; deciders on log-mel or on the small
    # encoder's states alone were worse than rules.
    INPUTS=(transcript small_model) FRAMES=none ROUTING=output/routing_own_length MODELS=$ROUTING/models/whisper-
    TABLE=own-length- CORPUS="routing-dev, silence cache and int8 decoder"
    LABEL_OPTIONS="$LABEL_OPTIONS --quantise decoder-int8"
fi
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

# label_all <name> <frames>: label all splits with one model; the MACs of training utterances are not needed.
label_all() {
    if [ -n "${OWN_LENGTH:-}" ] && [ ! -d "$MODELS$1" ]; then
        mkdir -p "$(dirname "$MODELS")"
        "$PYTHON" -m efficient_asr calibrate "$EFFICIENT_ASR_MODELS/whisper-$1" --out "$MODELS$1"
    fi
    # shellcheck disable=SC2086
    label "$1" "$MODELS$1" whisper $MANIFESTS "$2" $ROUTING $TESTS dev
    LABEL_OPTIONS="$LABEL_OPTIONS --count_macs False" label "$1" "$MODELS$1" whisper $MANIFESTS "$2" $ROUTING "$TRAIN"
}

# compare <small> <large>: label, train deciders of each kind with three seeds, and make the table and the plot.
compare() {
    local small=$1 large=$2 deciders=() part
    part=$([ "$TRAIN" = train ] || echo "_$TRAIN") # deciders of less data have folders of their own
    label_all "$small" unpadded
    label_all "$large" "$FRAMES"
    for router_input in "${INPUTS[@]}"; do
        for seed in ${SEEDS:-1986 1987 1988}; do
            local output=output/decider_$TABLE${small}_${large}_$router_input$part/$seed
            deciders+=("$output/model")
            [ -f "$output/model/config.json" ] || "$PYTHON" recipes/decider/train.py hparams/real/decider.yaml --seed "$seed" \
                --router_input "$router_input" --small_name "$small" --large_name "$large" --train_split "$TRAIN" --train_only True \
                --small "$MODELS$small" --large "$MODELS$large" --labels_folder $ROUTING/labels --states_folder $ROUTING/states \
                --output_folder "$output"
        done
    done
    # shellcheck disable=SC2086
    "$PYTHON" recipes/decider/compare.py --pair "$small" "$large" --tests $TESTS --deciders "${deciders[@]}" \
        --labels $ROUTING/labels --states $ROUTING/states --models "$MODELS$small" "$MODELS$large" --corpus "$CORPUS" \
        --out "results/routing/$TABLE$small-$large.json"
}

if [ $# -eq 0 ]; then set -- tiny base tiny small; fi
if [ $(($# % 2)) -ne 0 ]; then
    echo "error: give pairs of models, such as: tiny base tiny small; there are $# names" >&2
    exit 2
fi
while [ $# -gt 1 ]; do
    compare "$1" "$2"
    shift 2
done
report
