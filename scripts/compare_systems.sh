#!/usr/bin/env bash
# The picture of the README: Whispers of three sizes in the forms of this project, students, models trained with audio_context, an
# encoder with CTC, and CTranslate2 (the engine of faster-whisper), on the same 84 utterances, timed in turns. Needs EFFICIENT_ASR_DATA,
# EFFICIENT_ASR_MODELS, and the models of reproduce_distil_whisper.sh, reproduce_english_ctc.sh and recipes/audio_context, which are
# left out if they are not there. About 40 minutes on 2 CPU cores; TIMED=0 only transcribes. Restartable.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${EFFICIENT_ASR_DATA:?set it to the folder of the development speech}"
: "${EFFICIENT_ASR_MODELS:?set it to the folder that holds whisper-tiny, whisper-base and whisper-small}"
source scripts/setup.sh
CACHE="encoder_padding=silence_cache;quantise=decoder-int8"
systems=()
for size in tiny base small; do
    whisper=$EFFICIENT_ASR_MODELS/whisper-$size
    if [ "$size" != small ]; then # in the others, small takes 10 s an utterance
        systems+=("whisper-$size=$whisper" "whisper-$size, CTranslate2 int8=$whisper;backend=ctranslate2;quantise=int8")
    fi
    systems+=("whisper-$size, silence cache, int8 decoder=$whisper;$CACHE")
done
systems+=("whisper-base, silence cache, int8 decoder, ONNX=$EFFICIENT_ASR_MODELS/whisper-base;$CACHE;backend=onnx")
add() { # add <name> <model folder> [;options]
    if [ -d "$2" ]; then systems+=("$1=$2${3:-}"); else echo "left out: $1, there is no $2"; fi
}
add "whisper-tiny, audio context, int8 decoder" output/audio_context_tiny/1986/model ";quantise=decoder-int8"
add "whisper-base, audio context, int8 decoder" output/audio_context_base/1986/model ";quantise=decoder-int8"
add "student of base, silence cache, int8 decoder" output/distil_whisper_real/student/model ";$CACHE"
add "encoder of base with CTC" output/english_ctc/1986/model
"$PYTHON" -m efficient_asr compare "${systems[@]}" --language en --timed "${TIMED:-5}" --out "${OUT:-results/compared/systems.json}" \
    --manifest "$EFFICIENT_ASR_DATA"/{librispeech_test_other,ljspeech}/manifest.jsonl
"$PYTHON" scripts/report.py
