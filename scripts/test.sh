#!/usr/bin/env bash
# Run the tests: without arguments the fast ones; arguments are passed to pytest: bash scripts/test.sh -m "slow or recipe or real", or a file
# Runs on up to four cores, one thread each; WORKERS=0 runs everything in one process.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh
if [ $# -eq 0 ]; then set -- -m "not slow and not recipe and not real"; fi
cores=$("$PYTHON" -c 'import os; print(min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()))')
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "$PYTHON" -m pytest -q -n "${WORKERS:-$cores}" --dist worksteal "$@"
