#!/usr/bin/env bash
# The systems of arXiv 2311.01070 on Common Voice 13 and FLEURS: LoRA, CLSR-FT, JS and KL in Whisper small, and full fine-tuning. Trains,
# tests on Common Voice, then on FLEURS (out of domain; X to English with BLEU if en_us is available). Needs a GPU. Restartable.
#
#   bash scripts/reproduce_clsr.sh CV_FOLDER FLEURS_FOLDER LANGUAGE [...] [-- --key value ...]     # one model per language, as in the paper
#   TOGETHER=1 bash scripts/reproduce_clsr.sh CV_FOLDER FLEURS_FOLDER ca th                        # one model for all of them
#   METHODS="clsr_js lora" SIZE=3k bash scripts/reproduce_clsr.sh ...                              # selected methods; SIZE is 3k, 10k or 28k; SEED=78
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -ge 3 ] || { sed -n 2,8p "$0" >&2; exit 2; }
CV=$1 FLEURS=$2 LANGUAGES=()
shift 2
while [ $# -gt 0 ] && [ "$1" != -- ]; do LANGUAGES+=("$1"); shift; done
[ "${1:-}" != -- ] || shift
[ ${#LANGUAGES[@]} -gt 0 ] || { echo "error: give at least one language, such as ca" >&2; exit 2; }
SEED=${SEED:-77}
source scripts/setup.sh
SIZE=${SIZE:-10k}
case $SIZE in
3k) DATA=(--max_train 3000 --max_valid 500) ;;
10k) DATA=(--max_train 10000 --max_valid 1000) ;;
28k) DATA=(--max_train 28000 --max_valid 1000) ;;
*) echo "error: invalid SIZE '$SIZE'; use 3k, 10k or 28k" >&2; exit 2 ;;
esac

train_and_test() { # train_and_test <method> <languages> [--key value ...]
    local method=$1 name languages recipe
    languages=${2// /, }
    name="${method}_${SIZE}_${2// /_}"
    [ "$SEED" = 77 ] || name="${name}_seed$SEED"
    shift 2
    case $method in
    lora) recipe=lora ;;
    clsr_full) recipe=finetune_whisper ;;
    *) recipe=clsr ;;
    esac
    run "$name" "$recipe" "$method" --experiment "$name" --seed "$SEED" --data_folder "$CV" --prepared_folder "data/clsr_common_voice/$SIZE/$name" \
        --languages "[$languages]" "${DATA[@]}" "$@"
    test_on_fleurs "$name" "${languages//, /,}"
}

test_on_fleurs() { # test_on_fleurs <experiment> <languages>: transcripts, and translations if English is available
    local name=$1 manifests="data/fleurs-${2//,/-}" results=${RESULTS:-results/runs} task out
    "$PYTHON" - "$FLEURS" "$manifests" "$2" <<'PY'
import sys
from pathlib import Path
from efficient_asr.corpora import prepare_corpus
from efficient_asr.corpora.fleurs import whisper_code
root, out, codes = Path(sys.argv[1]), Path(sys.argv[2]), [a.partition("-")[0] for a in sys.argv[3].split(",")]
folders = sorted(f.name for f in root.iterdir() if f.is_dir() and whisper_code(f.name) in codes)
if len(folders) < len(codes):
    sys.exit(f"error: {root} contains only {', '.join(folders) or 'none'} of the languages {', '.join(codes)}")
english = (root / "en_us" / "test.tsv").is_file()
prepare_corpus("fleurs", str(root), out, {"languages": folders, "splits": ["test"], "translations": english})
PY
    for task in transcribe translate; do
        out="$results/$name-fleurs-$task.json"
        if [ -f "$out" ] || { [ "$task" = translate ] && [ ! -f "$FLEURS/en_us/test.tsv" ]; }; then continue; fi
        "$PYTHON" scripts/evaluate.py "output/$name/$SEED/model" --manifest "$manifests/test.jsonl" --language manifest --task "$task" \
            --normaliser multilingual --runtime_devices all --out "$out"
    done
}

for method in ${METHODS:-lora clsr_ft clsr_js clsr_kl clsr_full}; do
    if [ -n "${TOGETHER:-}" ]; then
        train_and_test "$method" "${LANGUAGES[*]}" "$@"
    else
        for language in "${LANGUAGES[@]}"; do train_and_test "$method" "$language" "$@"; done
    fi
done
if [ -z "${RESULTS:-}" ]; then "$PYTHON" scripts/report.py; fi
