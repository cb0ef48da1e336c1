#!/usr/bin/env bash
# Lint, types and tests, from a bare clone on: ./test.sh [arguments of pytest]
set -euo pipefail
cd "$(dirname "$0")"
./setup.sh
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/pyright --pythonpath .venv/bin/python
OMP_NUM_THREADS=1 exec .venv/bin/python -m pytest --numprocesses "${TEST_PROCESSES:-2}" --dist loadfile --max-worker-restart 0 --durations 10 "$@"
