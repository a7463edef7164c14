#!/usr/bin/env bash
# The downsampling table of arXiv 2303.06740: WavLM-large with CTC on LibriSpeech train-clean-100, tested on test-clean and
# test-other, one row per run. Needs a GPU. Restartable: finished runs are skipped, and an interrupted run resumes from its
# checkpoint. Further arguments are passed to every run.
#
#   bash scripts/reproduce_downsampling.sh /corpora/LibriSpeech [--lm_path 4gram.arpa] [--key value ...]
#   ESTIMATE=1 bash scripts/reproduce_downsampling.sh /corpora/LibriSpeech      # hours and memory that this needs, on this machine
#   ONLY="finetune_ctc downsampling_average_x2" bash scripts/reproduce_downsampling.sh ...      # some of the rows
#
# To test on test-clean only, as in the paper, add --test_splits '[test-clean]'.
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -ge 1 ] || { echo "usage: $0 LIBRISPEECH_FOLDER [--key value ...]" >&2; exit 2; }
DATA=$1
shift
INDEPENDENT=1
source scripts/setup.sh
DATA=$(absolute "$DATA")

run finetune_ctc finetune_ctc finetune_ctc --data_folder "$DATA" "$@"
for technique in convolutional average signal; do
    for factor in 2 3 4; do
        run "downsampling_${technique}_x${factor}" downsampling downsampling --data_folder "$DATA" \
            --downsampling_technique "$technique" --downsampling_factor "$factor" --skip_bad True "$@"
    done
done
report
