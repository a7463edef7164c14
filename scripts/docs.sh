#!/usr/bin/env bash
# Build the documentation as a site, with the API from the docstrings. Fails on warnings, such as a dead link.
#
#   bash scripts/docs.sh [OUTPUT_FOLDER]      # default: output/site
#   bash scripts/docs.sh --check              # only look for warnings; writes no pages
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh
"$PYTHON" -c 'import furo, myst_parser, sphinx' 2>/dev/null || "$PYTHON" -m pip install -q -e '.[docs]'
if [ "${1:-}" = --check ]; then
    trees=$(mktemp -d)
    "$PYTHON" -m sphinx -q -W --keep-going -b dummy -c docs -d "$trees" . "$trees/none"
    rm -r "$trees"
    exit
fi
OUT=${1:-output/site}
"$PYTHON" -m sphinx -q -W --keep-going -b html -c docs -d "$OUT/.doctrees" . "$OUT"
echo "site: $OUT/docs/index.html"
