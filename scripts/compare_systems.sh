#!/usr/bin/env bash
# The picture of the README: Whispers of three sizes as they are and with the silence cache, a model trained with audio_context, an
# encoder with CTC, and CTranslate2 (the engine of faster-whisper), on the same 84 utterances, timed in turns. Needs EFFICIENT_ASR_DATA,
# EFFICIENT_ASR_MODELS, and the models of reproduce_english_ctc.sh and recipes/audio_context, which are left out if they are not
# there. About 25 minutes on 2 CPU cores; TIMED=0 only transcribes. Restartable.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${EFFICIENT_ASR_DATA:?set it to the folder of the development speech}"
: "${EFFICIENT_ASR_MODELS:?set it to the folder that holds whisper-tiny, whisper-base and whisper-small}"
source scripts/setup.sh
CACHE="encoder_padding=silence_cache;quantise=decoder-int8"
M=$EFFICIENT_ASR_MODELS
systems=("whisper-tiny=$M/whisper-tiny" "whisper-base=$M/whisper-base"
    "whisper-base, CTranslate2 int8=$M/whisper-base;backend=ctranslate2;quantise=int8")
for size in tiny base small; do systems+=("whisper-$size, silence cache, int8 decoder=$M/whisper-$size;$CACHE"); done
add() { # add <name> <model folder> [;options]
    if [ -d "$2" ]; then systems+=("$1=$2${3:-}"); else echo "left out: $1, there is no $2"; fi
}
add "whisper-base, audio context, int8 decoder" output/audio_context_base/1986/model ";quantise=decoder-int8"
add "encoder of base with CTC" output/english_ctc/1986/model
"$PYTHON" -m efficient_asr compare "${systems[@]}" --language en --timed "${TIMED:-4}" --out "${OUT:-results/compared/systems.json}" \
    --manifest "$EFFICIENT_ASR_DATA"/{librispeech_test_other,ljspeech}/manifest.jsonl
"$PYTHON" scripts/report.py
