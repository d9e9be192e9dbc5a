#!/usr/bin/env bash
# All tests in their own virtual environment. Arguments go to pytest, e.g. `scripts/test.sh -m "not slow"`.
. "$(dirname "${BASH_SOURCE[0]}")/_venv.sh" test

ruff check .
exec python -m pytest "$@"
