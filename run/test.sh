#!/usr/bin/env bash
# Run the tests in the virtual environment .venv-test, which is created if necessary.
#   bash run/test.sh                  lint, type check, fast tests, then slow tests (with real ranks)
#   bash run/test.sh -m "not slow"    run pytest with these arguments only
set -euo pipefail
cd "$(dirname "$0")/.."

venv=.venv-test
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
export PATH="$PWD/$venv/bin:$PATH" OMP_NUM_THREADS=1 DS_ACCELERATOR="${DS_ACCELERATOR:-}"
[ -n "$DS_ACCELERATOR" ] || unset DS_ACCELERATOR
if ! cmp -s <(cat requirements*.txt) "$venv/installed.txt"; then
  pip install --quiet --disable-pip-version-check -r requirements.txt
  # Import every module before the development packages are installed, since these could hide a
  # missing entry in requirements.txt.
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
  echo 'Some files are not formatted; run: ruff format .'
  exit 1
fi
ruff check .
bash run/typecheck.sh
# Run two tests at a time: a launch of ranks is often a single busy process, or waits.
for round in "not slow" slow; do
  python -m pytest -q -n 2 --dist loadfile -m "$round" --durations=10
done
