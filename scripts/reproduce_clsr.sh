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
CV=$(absolute "$CV") FLEURS=$(absolute "$FLEURS")
SIZE=${SIZE:-10k}
case $SIZE in
3k) DATA=(--max_train 3000 --max_valid 500) ;;
10k) DATA=(--max_train 10000 --max_valid 1000) ;;
28k) DATA=(--max_train 28000 --max_valid 1000) ;;
*) echo "error: invalid SIZE '$SIZE'; use 3k, 10k or 28k" >&2; exit 2 ;;
esac

# fleurs_folders <code> ...: print FLEURS' folders of these languages.
fleurs_folders() {
    "$PYTHON" - "$FLEURS" "$@" <<'PY'
import sys
from pathlib import Path
from efficient_asr.corpora.fleurs import whisper_code
root, codes = Path(sys.argv[1]), [code.partition("-")[0] for code in sys.argv[2:]]
found = sorted(f.name for f in root.iterdir() if whisper_code(f.name) in codes and (f / "test.tsv").is_file()) if root.is_dir() else []
if missing := [code for code in codes if code not in map(whisper_code, found)]:
    sys.exit(f"error: {root} has no folder with a test.tsv for {', '.join(missing)}; docs/reproducing.md shows how to fetch FLEURS")
print(*found)
PY
}

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
    # shellcheck disable=SC2046,SC2086
    "$PYTHON" - "$FLEURS" "$manifests" $(fleurs_folders ${2//,/ }) <<'PY'
import sys
from pathlib import Path
from efficient_asr.corpora import prepare_corpus
root, out, folders = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
english = (root / "en_us" / "test.tsv").is_file()
prepare_corpus("fleurs", str(root), out, {"languages": folders, "splits": ["test"], "translations": english})
PY
    for task in transcribe translate; do
        out="$results/$name-fleurs-$task.json"
        if [ "$task" = translate ] && [ ! -f "$FLEURS/en_us/test.tsv" ]; then continue; fi
        if finished "$results" "$name-fleurs-$task" "$FLEURS"; then continue; fi
        "$PYTHON" scripts/evaluate.py "output/$name/$SEED/model" --manifest "$manifests/test.jsonl" --language manifest --task "$task" \
            --normaliser multilingual --runtime_devices all --out "$out"
        finish "$results" "$name-fleurs-$task" "$FLEURS"
    done
}

for language in "${LANGUAGES[@]}"; do # before hours of training
    [ -d "$CV/$language" ] || { echo "error: $CV has no folder '$language'" >&2; exit 2; }
done
fleurs_folders "${LANGUAGES[@]}" >/dev/null
for method in ${METHODS:-lora clsr_ft clsr_js clsr_kl clsr_full}; do
    if [ -n "${TOGETHER:-}" ]; then
        train_and_test "$method" "${LANGUAGES[*]}" "$@"
    else
        for language in "${LANGUAGES[@]}"; do train_and_test "$method" "$language" "$@"; done
    fi
done
report
