#!/usr/bin/env bash
# All tests, in a virtual environment of their own.
#   bash run/test.sh                     everything: lint, fast tests, then the slow ones (real DeepSpeed ranks)
#   bash run/test.sh -m "not slow"       any pytest arguments instead of the default two rounds
set -euo pipefail
cd "$(dirname "$0")/.."

venv=.venv-test
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
export PATH="$PWD/$venv/bin:$PATH" OMP_NUM_THREADS=1 DS_ACCELERATOR="${DS_ACCELERATOR:-}"
[ -n "$DS_ACCELERATOR" ] || unset DS_ACCELERATOR
if ! cmp -s <(cat requirements*.txt) "$venv/installed.txt"; then
  pip install --quiet --disable-pip-version-check -r requirements.txt
  # With the runtime packages alone every module must import: a package that only the peers bring in would hide a missing one.
  [ -e "$venv/installed.txt" ] || python -c 'import importlib, pathlib; [importlib.import_module("glimpse." + str(p.with_suffix("")).replace("/", ".")) for top in ("data", "model", "run") for p in sorted(pathlib.Path(top).rglob("*.py")) if p.name != "__init__.py"]'
  pip install --quiet --disable-pip-version-check -r requirements-dev.txt
  cat requirements*.txt > "$venv/installed.txt"
fi

if [ $# -gt 0 ]; then exec python -m pytest "$@"; fi
ruff format --check --quiet . || { echo 'not formatted: run ruff format .'; exit 1; }
ruff check .
for round in "not slow" slow; do  # two at a time: much of a launch is one process's work, or waiting
  python -m pytest -q -n 2 --dist loadfile -m "$round" --durations=10
done
