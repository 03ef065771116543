#!/usr/bin/env bash
# Check the types of what training runs: data/, model/, run/lib, run/train and run/pretrain.py.
#   bash run/typecheck.sh
# A type checker cannot follow glimpse/__init__.py, which finds the packages at run time; so it is
# shown a folder in which they lie where their import names say.
set -euo pipefail
cd "$(dirname "$0")/.."

view=.mypy_cache/view/glimpse
mkdir -p "$view"
for name in data model run; do
  ln -sfn "$PWD/$name" "$view/$name"
done
ln -sf "$PWD/glimpse/__init__.py" "$view/__init__.py"
cd "$view/.."
mypy --config-file ../../pyproject.toml --cache-dir .. \
  -p glimpse.data -p glimpse.model -p glimpse.run.lib -p glimpse.run.train -m glimpse.run.pretrain
