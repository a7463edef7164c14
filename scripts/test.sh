#!/usr/bin/env bash
# The tests. Without arguments the fast ones; arguments go to pytest, e.g.: bash scripts/test.sh -m "slow or recipe or real"
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh
if [ $# -eq 0 ]; then set -- -m "not slow and not recipe and not real"; fi
exec "$PYTHON" -m pytest -q tests "$@"
