#!/usr/bin/env bash
# All tests, in a virtual environment of their own.
#   bash run/test.sh                  everything: lint, fast tests, then the slow ones (real ranks)
#   bash run/test.sh -m "not slow"    any pytest arguments instead of the default two rounds
set -euo pipefail
cd "$(dirname "$0")/.."

venv=.venv-test
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
export PATH="$PWD/$venv/bin:$PATH" OMP_NUM_THREADS=1 DS_ACCELERATOR="${DS_ACCELERATOR:-}"
[ -n "$DS_ACCELERATOR" ] || unset DS_ACCELERATOR
if ! cmp -s <(cat requirements*.txt) "$venv/installed.txt"; then
  pip install --quiet --disable-pip-version-check -r requirements.txt
  # With the runtime packages alone every module must import: a package that only the peers bring in
  # would hide a missing one.
  if [ ! -e "$venv/installed.txt" ]; then
    python - <<'PYTHON'
import importlib
from pathlib import Path

for top in ("data", "model", "run"):
    for path in sorted(Path(top).rglob("*.py")):
        if path.name != "__init__.py":
            importlib.import_module(".".join(["glimpse", *path.with_suffix("").parts]))
PYTHON
  fi
  pip install --quiet --disable-pip-version-check -r requirements-dev.txt
  cat requirements*.txt > "$venv/installed.txt"
fi

if [ $# -gt 0 ]; then exec python -m pytest "$@"; fi
if ! ruff format --check --quiet .; then
  echo 'not formatted: run ruff format .'
  exit 1
fi
ruff check .
bash run/typecheck.sh
# Two at a time: much of a launch is one process's work, or waiting.
for round in "not slow" slow; do
  python -m pytest -q -n 2 --dist loadfile -m "$round" --durations=10
done
