#!/usr/bin/env bash
# A CTC baseline with thousands of updates, and early exit from there: Whisper base's encoder on 127 minutes of
# English. Needs EFFICIENT_ASR_DATA (arctic_en, librispeech_unlabelled, ljspeech, librispeech_test_other, lm; beside it
# models/whisper_base_ctc, from which the training continues). About two hours on 2 CPU cores. Restartable. FAMILIES=1 adds layer removal
# and downsampling, for another hour, and times all rows; do that on a quiet machine.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${EFFICIENT_ASR_DATA:?set it to the folder of the development speech}"
source scripts/setup.sh
source recipes/finetune_ctc/lm.sh
source recipes/early_exit/sweep.sh
trained() { # trained <experiment> <recipe> <yaml> [--key value ...]
    local experiment=$1 recipe=$2 yaml=$3
    shift 3
    [ -f "output/$experiment/1986/model/config.json" ] ||
        "$PYTHON" "recipes/$recipe/train.py" "hparams/real/$yaml.yaml" --train_only True --device cpu "$@"
}

run english_ctc finetune_ctc real/english_ctc --lm_path "$LM" --runtime_repeats 1
trained english_early_exit early_exit english_early_exit
systems=("full=output/english_ctc/1986/model" "early exit, full depth=output/english_early_exit/1986/model")
TIMED=0
if [ -n "${FAMILIES:-}" ]; then
    TIMED=4
    trained english_layer_removal_first_5 layer_removal english_layer_removal
    trained english_downsampling_average_x2 downsampling english_downsampling --downsampling_technique average --number_of_epochs 2
    systems+=("first 5 layers=output/english_layer_removal_first_5/1986/model"
        "average x2=output/english_downsampling_average_x2/1986/model")
fi
# Of the validation split (recipes/early_exit/sweep.py): 0.3 points of WER at most (similarity has no such threshold); mean layers 5.5 and 5.
for pair in entropy:0.1586 entropy:0.2274 entropy:0.2855 similarity:0.8859; do
    exits "early exit, ${pair/:/ }" english_early_exit --rule "${pair%%:*}" --threshold "${pair##*:}"
done
"$PYTHON" -m efficient_asr compare "${systems[@]}" --timed $TIMED --out results/compared/english_ctc.json \
    --manifest data/real/{arctic_en,ljspeech,librispeech_test_other}.jsonl
report
