#!/usr/bin/env bash
# Make .venv with everything that is needed; does nothing in seconds where that is done already.
# Sourced by the other scripts: afterwards $PYTHON is the interpreter, and `run` trains what is not trained yet. Choose another Python with PYTHON_BASE=python3.12,
# another place with VENV=/path.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${VENV:-$ROOT/.venv}

find_python() {
    for candidate in ${PYTHON_BASE:-python3 python3.12 python3.11 python3.13 python3.10}; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 14))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: Python 3.10 to 3.13 is needed; name one with PYTHON_BASE=/path/to/python" >&2
    return 2
}

install_all() {
    local python=$1 pip="$VENV/bin/python -m pip --disable-pip-version-check"
    echo "setting up $VENV (about 1.5 GB; some minutes the first time)"
    [ -x "$VENV/bin/python" ] || "$python" -m venv "$VENV"
    # A machine without a GPU takes the CPU build where PyTorch's own index can be reached, and what pip finds otherwise.
    local torch
    torch=$(grep '^torch==' "$ROOT/requirements.txt")
    if [ "$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null 2>&1 &&
        $pip install -q --retries 0 --timeout 8 --index-url https://download.pytorch.org/whl/cpu "$torch" 2>/dev/null; then
        :
    else
        $pip install -q "$torch"
    fi
    $pip install -q --no-deps "$(grep '^torchaudio==' "$ROOT/requirements.txt")"
    # torchaudio is published as a CUDA build only. Beside a CPU torch its compiled part, which holds nothing that is used
    # here, cannot be loaded and must go.
    if ! "$VENV/bin/python" -c 'import torchaudio' 2>/dev/null; then
        "$VENV/bin/python" - <<'PY'
import importlib.util, pathlib
folder = pathlib.Path(importlib.util.find_spec("torchaudio").origin).parent / "lib"
for library in folder.glob("*.so"):
    library.unlink()
PY
        "$VENV/bin/python" -c 'import torchaudio'
    fi
    $pip install -q -r "$ROOT/requirements.txt"
    $pip install -q -e "$ROOT[dev]"
    $pip install -q -e "$ROOT[lm]" ||
        echo "kenlm could not be installed (it may need a C++ compiler): decoding with language models is left out, and its columns stay empty"
}

STAMP=$(cat "$ROOT/requirements.txt" "$ROOT/setup.py" "$ROOT/scripts/setup.sh" | cksum)
if [ ! -x "$VENV/bin/python" ] || [ "$(cat "$VENV/.efficient_asr" 2>/dev/null)" != "$STAMP" ]; then
    install_all "$(find_python)"
    echo "$STAMP" >"$VENV/.efficient_asr"
fi
PYTHON=$VENV/bin/python

# run <experiment> <recipe> <yaml> [--key value ...]: train and measure, unless its result, that of LAST_SPLIT where it has several, is
# there. What was interrupted goes on.
run() {
    local experiment=$1 recipe=$2 yaml=$3 results=${RESULTS:-results/runs}
    shift 3
    if [ -f "$results/$experiment.json" ] || [ -f "$results/$experiment-${LAST_SPLIT:-}.json" ]; then
        echo "== $experiment is done: $results/$experiment*.json"
        return
    fi
    echo "== $experiment"
    "$PYTHON" "recipes/$recipe/train.py" "hparams/$yaml.yaml" --results_folder "$results" "$@"
}
