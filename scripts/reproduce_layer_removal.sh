#!/usr/bin/env bash
# The rows for layer removal, layer drop and small models of arXiv 2303.06740 on LibriSpeech train-clean-100. Needs a GPU.
# Restartable: finished runs are skipped, interrupted runs resume. Further arguments are passed to every run.
#
#   bash scripts/reproduce_layer_removal.sh /corpora/LibriSpeech [--lm_path 4gram.arpa] [--key value ...]
#   ESTIMATE=1 bash scripts/reproduce_layer_removal.sh /corpora/LibriSpeech      # hours and memory that this needs, on this machine
#   ONLY="layer_removal_first_18" bash scripts/reproduce_layer_removal.sh ...                  # some of the rows
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -ge 1 ] || { echo "usage: $0 LIBRISPEECH_FOLDER [--key value ...]" >&2; exit 2; }
DATA=$1
shift
INDEPENDENT=1
source scripts/setup.sh
DATA=$(absolute "$DATA")

for layers in 24 22 20 18 16 14 12; do
    run "layer_removal_first_$layers" layer_removal layer_removal --data_folder "$DATA" --kept_layers "first_$layers" \
        --output_folder "output/layer_removal_first_$layers" "$@"
done
# Layer drop evaluates the model with all 24 layers, trained above.
for p in 0.5 0.4 0.3 0.25 0.2; do
    run "layer_drop_$p" layer_removal layer_removal --data_folder "$DATA" --experiment "layer_drop_$p" --kept_layers first_24 \
        --output_folder output/layer_removal_first_24 --test_only True --test_layerdrop "$p" \
        --variant "layerdrop $p" "$@"
done
# The small models are settings of the baseline's recipe.
run distilhubert_linear finetune_ctc finetune_ctc --data_folder "$DATA" --experiment distilhubert_linear \
    --source ntu-spml/distilhubert --head_block none --number_of_epochs 20 \
    --variant "distilhubert linear" "$@"
run distilhubert_bilstm finetune_ctc finetune_ctc --data_folder "$DATA" --experiment distilhubert_bilstm \
    --source ntu-spml/distilhubert --head_block bilstm --head_layers 2 --head_dropout 0.2 \
    --number_of_epochs 20 --variant "distilhubert bilstm" "$@"
run filterbanks finetune_ctc finetune_ctc --data_folder "$DATA" --experiment filterbanks \
    --features fbank --variant "filterbank front end" "$@"
report
