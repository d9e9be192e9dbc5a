# Sourced by the set-up scripts: makes .venv beside the sources and installs nano4m into it, once per change of
# pyproject.toml or constraints.txt. Usage: . scripts/_venv.sh [extras]. Python: $PYTHON, else 3.12 or 3.11 found.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extras=${1:-}

find_python() {
  for candidate in ${PYTHON:-} python3.11 python3.12 python3 python; do
    if command -v "$candidate" >/dev/null 2>&1 &&
      "$candidate" -c 'import sys; sys.exit(not ((3, 11) <= sys.version_info[:2] <= (3, 12)))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "error: no Python 3.11 or 3.12 found" >&2
  echo "hint: install one, or name it: PYTHON=/path/to/python3.11 bash $0" >&2
  exit 1
}

venv=${NANO4M_VENV:-.venv}
stamp="$venv/.nano4m-installed$extras"
if [ ! -f "$stamp" ] || [ pyproject.toml -nt "$stamp" ] || [ constraints.txt -nt "$stamp" ]; then
  python=$(find_python)
  echo "setting up $venv with $($python --version) (a few minutes the first time)" >&2
  [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
  "$venv/bin/python" -m pip install --quiet --upgrade pip
  "$venv/bin/python" -m pip install --quiet -c constraints.txt -e ".${extras:+[$extras]}"
  touch "$stamp"
fi
export PATH="$PWD/$venv/bin:$PATH"
