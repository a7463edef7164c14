#!/usr/bin/env bash
# What the silence cache costs, on real speech: languages, noise, telephone prompts, digits, long recordings. Needs EFFICIENT_ASR_DATA
# and EFFICIENT_ASR_MODELS, and apt-get for the prompts (they are left out without it). Restartable: what is in a result is not run
# again. One to two hours for three models on 2 CPU cores.
#
#   bash scripts/reproduce_silence_cache.sh [tiny] [base] [small]      # default: all
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh
: "${EFFICIENT_ASR_DATA:?set it to the folder of real speech}" "${EFFICIENT_ASR_MODELS:?set it to the folder of the Whisper models}"
D=$EFFICIENT_ASR_DATA OUT=${OUT:-results/silence_cache} WORK=data/silence_cache
CACHE="0.2 s, groups of 16 but for 64"

for name in librispeech_test_other ljspeech; do # background noise at 0 to 10 dB, no reverberation
    [ -f "$WORK/${name}_noisy/manifest.jsonl" ] || "$PYTHON" scripts/mix_noise.py "$D/$name/manifest.jsonl" --snr_high_db 10 \
        --noise "$D/noise_esc10/manifest.jsonl" --out "$WORK/${name}_noisy"
done
[ -f "$WORK/calibration_noisy/manifest.jsonl" ] || "$PYTHON" scripts/mix_noise.py "$D/librispeech_unlabelled/manifest.jsonl" --count 16 \
    --noise "$D/noise_esc10/manifest.jsonl" --snr_high_db 10 --out "$WORK/calibration_noisy"
"$PYTHON" - "$D" "$WORK" <<'PY'
import sys
from pathlib import Path

import soundfile
import torch

from efficient_asr.corpora import prepare_corpus
from efficient_asr.data import SAMPLE_RATE, load_row, read_manifest, write_manifest
from efficient_asr.utils.errors import UserError

data, work = map(Path, sys.argv[1:])
if not (work / "digits" / "manifest.jsonl").is_file():  # five digits of one speaker, a tenth of a second apart
    speakers, rows = {}, []
    for row in read_manifest(data / "fsdd" / "manifest.jsonl"):
        speakers.setdefault(row["speaker"], []).append(row)
    (work / "digits").mkdir(parents=True, exist_ok=True)
    for number in range(60):
        own = list(speakers.values())[number % len(speakers)]
        start = number // len(speakers) * 53
        digits = [own[(start + 61 * i) % len(own)] for i in range(5)]
        gap = torch.zeros(SAMPLE_RATE // 10)
        wav = torch.cat([part for row in digits for part in (load_row(row), gap)])
        path = work / "digits" / f"{number:02d}.flac"
        soundfile.write(path, wav.numpy(), SAMPLE_RATE)
        about = {"id": f"digits-{number:02d}", "audio": str(path.resolve()), "duration": len(wav) / SAMPLE_RATE}
        rows.append(about | {"text": " ".join(row["text"] for row in digits), "language": "en"})
    write_manifest(work / "digits" / "manifest.jsonl", rows)
try:
    if not (work / "asterisk" / "test_ru.jsonl").is_file():
        options = {"languages": ["es", "fr", "it", "ru"], "min_words": 3, "download": True}
        prepare_corpus("asterisk", str(work / "packages"), work / "asterisk", options)
except UserError as error:
    print(f"telephone prompts are left out: {error}", file=sys.stderr)
PY

[ $# -gt 0 ] || set -- tiny base small
for model in "$@"; do
    whisper=$EFFICIENT_ASR_MODELS/whisper-$model
    case $model in tiny) count=60 ;; base) count=30 ;; *) count=20 ;; esac
    prompts=("$WORK"/asterisk/test_{es,fr,it,ru}.jsonl)
    [ -f "${prompts[0]}" ] || prompts=()
    compare() { "$PYTHON" recipes/silence_cache/compare.py "$whisper" "$@"; }
    if [ "$model" = tiny ]; then # groups, paddings, calibration
        compare --manifest "$D"/{librispeech_test_other,ljspeech,arctic_en,kerstin_de,nathalie_nl}/manifest.jsonl --utterances 60 \
            --calibration "$D/librispeech_unlabelled/manifest.jsonl" --out "$OUT/tiny.json"
    else
        compare --manifest "$D"/{librispeech_test_other,ljspeech,arctic_en,kerstin_de,nathalie_nl}/manifest.jsonl --utterances $count \
            --variants "$CACHE" "0.2 s, groups of 4" "cache, int8 decoder" "cache, int8 decoder, onnx" --out "$OUT/$model.json"
    fi
    noise=("$CACHE" "0.2 s, no groups" "0.2 s, groups of 4" "0.2 s, groups of 4, recordings")
    if [ "$model" = tiny ]; then # what else could be done about noise: other groups, more real silence
        noise+=("0.2 s, groups of 8 but for 64" "0.2 s, groups of 8 but for 32" "0.2 s, groups of 16 but for 128"
            "0.2 s, groups of 4 but for 64" "0.2 s, groups of 2" "0.2 s, groups of 2, recordings" "0.2 s, no groups, recordings"
            "1 s, groups of 4, recordings")
    fi
    compare --manifest "$WORK"/{librispeech_test_other,ljspeech}_noisy/manifest.jsonl --utterances $count --variants "${noise[@]}" \
        --calibration "$WORK/calibration_noisy/manifest.jsonl" --out "$OUT/noise-$model.json"
    if [ "$model" = small ]; then spoken=(10 "$CACHE"); else spoken=(20 "$CACHE" "0.2 s, no groups" "0.2 s, groups of 4"); fi
    compare --manifest "$WORK/digits/manifest.jsonl" ${prompts[@]+"${prompts[@]}"} --utterances "${spoken[0]}" --variants "${spoken[@]:1}" \
        --out "$OUT/prompts-$model.json"
    case $model in
    tiny) long=(15 "$CACHE" "0.2 s, groups of 4" "cache, int8 decoder") ;;
    base) long=(15 "$CACHE" "cache, int8 decoder") ;;
    *) long=(5 "$CACHE") ;;
    esac
    compare --manifest "$D/longform/manifest.jsonl" --long --utterances "${long[0]}" --variants "${long[@]:1}" --out "$OUT/long-$model.json"
done
report
