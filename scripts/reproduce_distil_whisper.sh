#!/usr/bin/env bash
# Distil-Whisper on real speech: Whisper small labels 77 minutes of English, and Whisper base with two decoder layers learns from the
# labels and from itself. Needs EFFICIENT_ASR_DATA (librispeech_unlabelled, arctic_en, ljspeech, librispeech_test_other, misc_short) and
# EFFICIENT_ASR_MODELS (whisper-tiny, base, small). About two hours on 2 CPU cores. Restartable. EPOCHS=20 trains longer.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${EFFICIENT_ASR_DATA:?set it to the folder of the development speech}"
: "${EFFICIENT_ASR_MODELS:?set it to the folder that holds whisper-tiny, whisper-base and whisper-small}"
source scripts/setup.sh
OUT=output/distil_whisper_real

for part in "librispeech_unlabelled " "arctic_en #train/3"; do
    for step in label filter; do
        "$PYTHON" "recipes/pseudo_labelling/$step.py" hparams/real/pseudo_labelling.yaml --part "${part%% *}" --rows "${part#* }" \
            --pack_s 30
    done
done
distil() {
    local name=$1
    shift
    if [ -f "$OUT/$name/model/config.json" ]; then
        echo "== $name is already trained: delete $OUT/$name to train it again (EPOCHS has no effect)"
        return
    fi
    "$PYTHON" recipes/distil_whisper/train.py hparams/real/distil_whisper.yaml --device cpu --train_only True \
        --number_of_epochs "${EPOCHS:-4}" --output_folder "$OUT/$name" "$@"
}
distil student
"$PYTHON" recipes/distil_whisper/make_student.py hparams/real/distil_whisper.yaml --output_folder "$OUT/before"

MODELS=$EFFICIENT_ASR_MODELS
FAST="encoder_padding=silence_cache;quantise=decoder-int8"
"$PYTHON" -m efficient_asr compare --language en --timed 3 --out results/distil_whisper/base.json \
    "whisper-base=$MODELS/whisper-base" "whisper-tiny=$MODELS/whisper-tiny" \
    "student 6-2, untrained=$OUT/before/student;max_tokens_per_s=8" "student 6-2=$OUT/student/model" \
    "student 6-2, silence cache, int8 decoder=$OUT/student/model;$FAST" \
    "whisper-base, silence cache, int8 decoder=$MODELS/whisper-base;$FAST" \
    "whisper-base, assistant: student=$MODELS/whisper-base;assistant=$OUT/student/model" \
    --manifest "$EFFICIENT_ASR_DATA"/{librispeech_test_other,ljspeech}/manifest.jsonl
# ABLATIONS=1: those of the paper, half an hour each. A free encoder computes its whole window at every step, an hour an epoch; it is
# trained for one epoch, and so is a frozen one beside it.
if [ -n "${ABLATIONS:-}" ]; then
    distil labels_only --kl_weight 0.0
    distil divergence_only --ce_weight 0.0
    for part in "librispeech_unlabelled " "arctic_en #train/3"; do # all labels, packed like the others
        from=output/real_labels_small/${part%% *} all=output/real_labels_all/${part%% *}
        mkdir -p "$all"
        cp "$from"/labels.jsonl "$from"/label.* "$all"
        "$PYTHON" recipes/pseudo_labelling/filter.py hparams/real/pseudo_labelling.yaml --part "${part%% *}" --rows "${part#* }" \
            --output_folder "$all" --pack_s 30 --max_error_percent null --min_avg_logprob null --max_no_speech_prob null \
            --max_repetition null
    done
    distil not_filtered --data_folder output/real_labels_all --prepared_folder data/real_distil_whisper_all
    EPOCHS=1 distil frozen_one_epoch --ce_weight 0.0
    EPOCHS=1 distil free_one_epoch --ce_weight 0.0 --freeze_encoder False --encoder_states_folder null
    FAST="$FAST;max_tokens_per_s=8" # students repeat themselves: at most 10 tokens plus 8 per second of audio
    systems=("whisper-base=$MODELS/whisper-base;$FAST")
    for name in student labels_only divergence_only not_filtered frozen_one_epoch free_one_epoch; do
        systems+=("${name//_/ }=$OUT/$name/model;$FAST")
    done
    "$PYTHON" -m efficient_asr compare "${systems[@]}" --language en --timed 0 --out results/compared/distil_ablations.json \
        --manifest "$EFFICIENT_ASR_DATA"/{librispeech_test_other,ljspeech}/manifest.jsonl data/real_distil_whisper_filtered_packed/arctic_en.jsonl
    "$PYTHON" -c 'import sys; from pathlib import Path; from efficient_asr.corpora import prepare_corpus
prepare_corpus("jsonl", sys.argv[1], Path("data/long_english"), {"manifests": {"long_english": ["longform/manifest.jsonl#language=en"]}})' \
        "$EFFICIENT_ASR_DATA"
    "$PYTHON" -m efficient_asr compare "whisper-base=$MODELS/whisper-base;$FAST" "divergence only=$OUT/divergence_only/model;$FAST" \
        --language en --timed 0 --out results/compared/distil_long.json --manifest data/long_english/long_english.jsonl
fi
# SMALL=1: students of Whisper small, for another two hours; the one that keeps half of the decoder needs few updates.
if [ -n "${SMALL:-}" ]; then
    distil small_12_2 --whisper small --ce_weight 0.0 --lr 0.0002
    EPOCHS=2 distil small_12_6 --whisper small --ce_weight 0.0 --lr 0.0001 --decoder_layers 6
    FAST="encoder_padding=silence_cache;quantise=decoder-int8;max_tokens_per_s=8"
    "$PYTHON" -m efficient_asr compare --language en --timed 3 --out results/compared/distil_small.json \
        "whisper-small=$MODELS/whisper-small;$FAST" "whisper-base=$MODELS/whisper-base;$FAST" \
        "student 12-2=$OUT/small_12_2/model;$FAST" "student 12-6=$OUT/small_12_6/model;$FAST" \
        --manifest "$EFFICIENT_ASR_DATA"/{librispeech_test_other,ljspeech}/manifest.jsonl
fi
# STACK=1: everything at once, beside faster-whisper (pip install faster-whisper): a student of base with four decoder layers, trained to
# do without the silence behind the audio, with an int8 decoder. Another hour; time it on a quiet machine.
if [ -n "${STACK:-}" ]; then
    distil base_6_4 --ce_weight 0.0 --lr 0.0001 --decoder_layers 4 --max_tokens_per_s 8
    SHORT=output/audio_context_student/1986/model
    [ -f "$SHORT/config.json" ] ||
        "$PYTHON" recipes/audio_context/train.py hparams/real/audio_context.yaml --whisper base --source "$OUT/base_6_4/model" \
            --experiment audio_context_student --targets_folder output/audio_context_targets/student --number_of_epochs 1 \
            --lora_rank 16 --lr 0.0003 --max_tokens_per_s 8 --train_only True --device cpu
    "$PYTHON" -m efficient_asr compare --language en --timed 0 --out results/compared/distil_stack.json \
        "whisper-base=$MODELS/whisper-base" "student 6-4=$OUT/base_6_4/model" "student 6-4, audio context=$SHORT" \
        "student 6-4, audio context, int8 decoder=$SHORT;quantise=decoder-int8" \
        --manifest "$EFFICIENT_ASR_DATA"/{librispeech_test_other,ljspeech}/manifest.jsonl
    "$PYTHON" scripts/benchmark_peers.py "$MODELS/whisper-base" --manifest "$EFFICIENT_ASR_DATA/librispeech_test_other/manifest.jsonl" \
        --utterances 32 --language en --models "student 6-4, audio context=$SHORT" --out results/peers/base-student.json \
        --systems ours "ours, silence cache, int8 decoder" "ours, silence cache, int8 decoder, ONNX" "faster-whisper int8"
fi
report
