#!/usr/bin/env bash
# Build the documentation as a site, with the API from the docstrings. Fails on warnings, such as a dead link.
#
#   bash scripts/docs.sh [OUTPUT_FOLDER]      # default: output/site
#   bash scripts/docs.sh --check              # only look for warnings; writes no pages
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh
if ! "$PYTHON" -c 'import furo, myst_parser, sphinx' 2>/dev/null; then
    if [ -n "${EFFICIENT_ASR_PYTHON:-}" ]; then
        echo "error: EFFICIENT_ASR_PYTHON: $PYTHON has no Sphinx; install it there: pip install -e '.[docs]'" >&2
        exit 2
    fi
    "$PYTHON" -m pip install -q -e '.[docs]'
fi
if [ "${1:-}" = --check ]; then
    trees=$(mktemp -d)
    "$PYTHON" -m sphinx -q -W --keep-going -b dummy -c docs -d "$trees" . "$trees/none"
    rm -r "$trees"
    exit
fi
OUT=$(absolute "${1:-$PWD/output/site}")
"$PYTHON" -m sphinx -q -W --keep-going -b html -c docs -d "$OUT/.doctrees" . "$OUT"
echo "site: $OUT/docs/index.html"
