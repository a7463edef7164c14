#!/usr/bin/env bash
# On a machine with a GPU: the tests that need one, training speed, and the GPU columns of a Result. Under five minutes.
#   bash scripts/gpu_check.sh [OUTPUT_FOLDER]
# On a bare machine without a network, put wheels into .whl/ first (see docs/long_runs.md); they are installed into a folder of their own.
set -euo pipefail
STARTED_IN=$PWD
cd "$(dirname "$0")/.."
OUT=${1:-$PWD/output/gpu_check}
[[ $OUT == /* ]] || OUT=$STARTED_IN/$OUT
VENV=${VENV:-.venv}
PYTHON=${PYTHON:-${EFFICIENT_ASR_PYTHON:-$([ -x "$VENV/bin/python" ] && echo "$VENV/bin/python" || echo python3)}}
mkdir -p "$OUT"
if ! "$PYTHON" -c 'import speechbrain, soundfile' 2>/dev/null && compgen -G ".whl/*.whl" >/dev/null; then
    SITE=$(mktemp -d)
    "$PYTHON" -m pip install -q --no-index --no-deps --target "$SITE" .whl/*.whl
    export PYTHONPATH=$SITE
fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
"$PYTHON" -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "error: no GPU that torch can use")'
echo "== tests that need a GPU"
timeout 60 "$PYTHON" -m pytest -q tests/training/test_gpu_loop.py tests/models/test_int8.py -p no:cacheprovider
echo "== training speed: an encoder of the size of Whisper base, bf16, 120 s batches of synthetic speech, three epochs"
timeout 150 "$PYTHON" recipes/finetune_ctc/train.py hparams/mini/gpu_speed.yaml --precision bf16 --output_folder "$OUT/speed" \
    --train_only True
tail -n 3 "$OUT/speed/throughput.jsonl"
echo "== GPU columns of a Result"
timeout 60 "$PYTHON" recipes/finetune_whisper/train.py hparams/mini/whisper.yaml --test_only True --output_folder "$OUT/whisper" \
    --runtime_devices all
echo "done: $OUT"
