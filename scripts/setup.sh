#!/usr/bin/env bash
# Create .venv with all requirements; if it is up to date, do nothing. The other scripts source this file after changing to the root: it
# sets $PYTHON to the interpreter and defines `run`. Choose another Python with PYTHON_BASE=python3.12, and another location with
# VENV=/path. With EFFICIENT_ASR_PYTHON=/path/python, that interpreter is used as it is, and nothing is installed (docs/installation.md).
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${VENV:-$ROOT/.venv}

# absolute <path>: a path relative to the folder in which the script was started, from which it has changed to the root.
absolute() {
    case $0:$1 in
    *: | *:/*) echo "$1" ;;
    *.sh:*) echo "${OLDPWD:-$PWD}/$1" ;;
    *) echo "$PWD/$1" ;; # this file was sourced in a shell
    esac
}
[ -z "${EFFICIENT_ASR_DATA:-}" ] || EFFICIENT_ASR_DATA=$(absolute "$EFFICIENT_ASR_DATA")
[ -z "${EFFICIENT_ASR_MODELS:-}" ] || EFFICIENT_ASR_MODELS=$(absolute "$EFFICIENT_ASR_MODELS")

find_python() {
    local candidates=("${PYTHON_BASE:-python3}")
    [ -n "${PYTHON_BASE:-}" ] || candidates+=(python3.12 python3.11 python3.13 python3.10)
    for candidate in "${candidates[@]}"; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 14))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: Python 3.10 to 3.13 is required; set PYTHON_BASE=/path/to/python" >&2
    return 2
}

install_all() {
    local python=$1 pip=("$VENV/bin/python" -m pip --disable-pip-version-check)
    echo "setting up $VENV (about 1.5 GB; takes some minutes the first time)"
    # Without pip, it was interrupted. On Debian, creating it fails until the package python3-venv is installed.
    "$VENV/bin/python" -m pip --version >/dev/null 2>&1 || "$python" -m venv --clear "$VENV"
    # Without a GPU, install the CPU build if PyTorch's index can be reached; otherwise install the default build.
    local torch
    torch=$(grep '^torch==' "$ROOT/requirements.txt")
    if [ "$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null 2>&1 &&
        "${pip[@]}" install -q --retries 0 --timeout 8 --index-url https://download.pytorch.org/whl/cpu "$torch" 2>/dev/null; then
        :
    else
        "${pip[@]}" install -q "$torch"
    fi
    "${pip[@]}" install -q --no-deps "$(grep '^torchaudio==' "$ROOT/requirements.txt")"
    # torchaudio is only published as a CUDA build. With a CPU build of torch, its compiled libraries cannot be loaded; they are not
    # used here, so remove them.
    if ! "$VENV/bin/python" -c 'import torchaudio' 2>/dev/null; then
        "$VENV/bin/python" - <<'PY'
import importlib.util, pathlib
folder = pathlib.Path(importlib.util.find_spec("torchaudio").origin).parent / "lib"
for library in folder.glob("*.so"):
    library.unlink()
PY
        "$VENV/bin/python" -c 'import torchaudio'
    fi
    "${pip[@]}" install -q -r "$ROOT/requirements.txt"
    "${pip[@]}" install -q -e "$ROOT[dev,fast,lm]" && return
    echo "trying again, one after the other"
    "${pip[@]}" install -q -e "$ROOT[dev]"
    "${pip[@]}" install -q -e "$ROOT[fast]" ||
        echo "ONNX Runtime and CTranslate2 could not be installed: the backends onnx and ctranslate2, and their tests, are skipped"
    "${pip[@]}" install -q -e "$ROOT[lm]" ||
        echo "kenlm could not be installed (it may need a C++ compiler): decoding with language models is skipped, and its columns stay empty"
}

STAMP=$(cat "$ROOT/requirements.txt" "$ROOT/setup.py" "$ROOT/scripts/setup.sh" | cksum)
if [ -n "${EFFICIENT_ASR_PYTHON:-}" ]; then
    if ! "$EFFICIENT_ASR_PYTHON" -c 'import efficient_asr' 2>/dev/null; then
        echo "error: EFFICIENT_ASR_PYTHON: $EFFICIENT_ASR_PYTHON cannot import efficient_asr; install it there (docs/installation.md)" >&2
        exit 2
    fi
elif [ ! -x "$VENV/bin/python" ] || [ "$(cat "$VENV/.efficient_asr" 2>/dev/null)" != "$STAMP" ]; then
    python=$(find_python)
    install_all "$python"
    echo "$STAMP" >"$VENV/.efficient_asr"
fi
PYTHON=${EFFICIENT_ASR_PYTHON:-$VENV/bin/python}

# With ESTIMATE=1, `run` only times a few batches of each training, and `report` prints their sum. With ONLY="a b", `run` runs only
# these experiments. Both need a script whose trainings do not depend on one another; it says so with INDEPENDENT=1.
if [ -n "${ESTIMATE:-}${ONLY:-}" ] && [ -z "${INDEPENDENT:-}" ] && [[ "$0" == *reproduce_* ]]; then
    echo "error: $0 knows neither ESTIMATE nor ONLY; pass --estimate to train.py instead (docs/reproducing.md)" >&2
    exit 2
fi
SEEN=" " ESTIMATED=() RESULTS_GIVEN=${RESULTS:-}

# wanted <experiment>: whether ONLY is not set, or names it.
wanted() {
    SEEN="$SEEN$1 "
    [ -z "${ONLY:-}" ] || [[ " $ONLY " == *" $1 "* ]]
}

# finished <results folder> <name> <options>: whether the results <name>*.json were computed here with these options. Those that came with
# the repository are computed again: their models did not come with it.
finished() {
    [ "$(cat "$1/.finished/$2" 2>/dev/null)" = "$3" ] && compgen -G "$1/$2*.json" >/dev/null || return 1
    echo "== $2 is already done: $1/$2*.json"
}

# finish <results folder> <name> <options>: remember that they were computed.
finish() {
    mkdir -p "$1/.finished"
    echo "$3" >"$1/.finished/$2"
}

# run <experiment> <recipe> <yaml> [--key value ...]: train and evaluate, unless this was done with the same options. Interrupted runs
# resume. Runtimes are measured on the CPU and, if there is one, on the GPU.
run() {
    local experiment=$1 recipe=$2 yaml=$3 results=${RESULTS:-results/runs} file
    shift 3
    wanted "$experiment" || return 0
    if [ -n "${ESTIMATE:-}" ]; then
        if [[ " $* " == *" --test_only True "* ]]; then
            echo "== $experiment only measures a model: not estimated"
            return
        fi
        echo "== $experiment"
        file=${ESTIMATES:-output/estimates}/$experiment.json
        "$PYTHON" "recipes/$recipe/train.py" "hparams/$yaml.yaml" --runtime_devices all "$@" --estimate "$file"
        ESTIMATED+=("$file")
        return
    fi
    if finished "$results" "$experiment" "$yaml $*"; then return; fi
    echo "== $experiment"
    "$PYTHON" "recipes/$recipe/train.py" "hparams/$yaml.yaml" --results_folder "$results" --runtime_devices all "$@"
    finish "$results" "$experiment" "$yaml $*"
}

# report: make tables, pages and plots of all results, or print the tables of RESULTS, or the sum of the estimates. Fails if ONLY names an
# unknown experiment.
report() {
    local name
    for name in ${ONLY:-}; do
        if [[ "$SEEN" != *" $name "* ]]; then
            echo "error: ONLY: there is no experiment '$name' here, but$SEEN" >&2
            return 2
        fi
    done
    if [ -n "${ESTIMATE:-}" ]; then
        "$PYTHON" -m efficient_asr.training.estimate ${ESTIMATED[@]+"${ESTIMATED[@]}"}
    elif [ -n "$RESULTS_GIVEN" ]; then
        "$PYTHON" scripts/report.py --runs "$RESULTS_GIVEN"
    else
        "$PYTHON" scripts/report.py
    fi
}
