#!/usr/bin/env bash
# The early exit table of arXiv 2303.06740: WavLM-large with heads on layers 13 to 24, LibriSpeech train-clean-100, test-clean. Two
# trainings (joint and two-step), then every threshold of the table from one pass each. Needs a GPU. Restartable. Further
# arguments go to both trainings.
#
#   bash scripts/reproduce_early_exit.sh /corpora/LibriSpeech [--key value ...]
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -ge 1 ] || { echo "usage: $0 LIBRISPEECH_FOLDER [--key value ...]" >&2; exit 2; }
DATA=$1
shift
source scripts/setup.sh

train() { # train <experiment> <name of its row> [--key value ...]
    local experiment=$1 variant=$2
    shift 2
    if [ -f "output/$experiment/1986/model/config.json" ]; then
        echo "== $experiment is trained"
        return
    fi
    echo "== $experiment"
    "$PYTHON" recipes/early_exit/train.py hparams/early_exit.yaml --data_folder "$DATA" --experiment "$experiment" \
        --exit_rule none --variant "$variant" --test_splits '[test-clean]' "$@"
}

sweep() { # sweep <experiment> <label> <rule> <threshold ...>
    local experiment=$1 label=$2 rule=$3
    shift 3
    echo "== $experiment: $rule $*"
    "$PYTHON" scripts/sweep.py "output/$experiment/1986/model" --manifest data/librispeech/test-clean.jsonl --rule "$rule" \
        --thresholds "$@" --batch_size 4 --repeats 3 --out results/runs --experiment "$experiment" --label "$label" \
        --corpus librispeech --split test-clean
}

train early_exit "full depth" "$@"
sweep early_exit "" entropy 0.06 0.03 0.025 0.01
sweep early_exit "" similarity 0.92 0.95 0.965 0.98
train early_exit_two_step "two-step full depth" --exit_training two_step "$@"
sweep early_exit_two_step "two-step " similarity 0.955 0.96 0.97 0.98
"$PYTHON" scripts/report.py
