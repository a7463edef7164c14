#!/usr/bin/env bash
# The early-exit table of arXiv 2303.06740: WavLM-large with heads on layers 13 to 24, LibriSpeech train-clean-100, test-clean.
# Trains the baseline and two early-exit models (joint and two-step), then evaluates every threshold of the table in one sweep per
# model and rule. Needs a GPU. Restartable. Further arguments are passed to the training runs.
#
#   bash scripts/reproduce_early_exit.sh /corpora/LibriSpeech [--key value ...]
#   ESTIMATE=1 bash scripts/reproduce_early_exit.sh /corpora/LibriSpeech      # hours and memory of the trainings, on this machine
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -ge 1 ] || { echo "usage: $0 LIBRISPEECH_FOLDER [--key value ...]" >&2; exit 2; }
DATA=$1
shift
INDEPENDENT=1
source scripts/setup.sh
DATA=$(absolute "$DATA")
source recipes/early_exit/sweep.sh

train() { # train <experiment> <recipe> [--key value ...]
    local experiment=$1 recipe=$2
    shift 2
    run "$experiment" "$recipe" "$recipe" --data_folder "$DATA" --experiment "$experiment" \
        --output_folder "output/$experiment" --test_splits '[test-clean]' "$@"
}

thresholds() { # thresholds <experiment> <label> <rule> <threshold ...>
    local experiment=$1 label=$2
    shift 2
    sweep "$experiment" "output/$experiment/model" data/librispeech/test-clean.jsonl "$@" --batch_size 4 --repeats 3 \
        --label "$label" --corpus librispeech
}

run finetune_ctc finetune_ctc finetune_ctc --data_folder "$DATA" "$@"
train early_exit early_exit --exit_rule none "$@"
thresholds early_exit "" entropy 0.06 0.03 0.025 0.01
thresholds early_exit "" similarity 0.92 0.95 0.965 0.98
train early_exit_two_step early_exit --exit_rule none --exit_training two_step --variant "two-step full depth" "$@"
thresholds early_exit_two_step "two-step " similarity 0.955 0.96 0.97 0.98
report
