#!/usr/bin/env bash
# Run the tests: without arguments the fast ones; arguments are passed to pytest, for example: bash scripts/test.sh -m "slow or recipe or real"
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh
if [ $# -eq 0 ]; then set -- -m "not slow and not recipe and not real"; fi
exec "$PYTHON" -m pytest -q tests "$@"
