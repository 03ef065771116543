#!/usr/bin/env bash
# Check the types of the code that training runs: data/, model/, run/lib, run/train and
# run/pretrain.py.
#   bash run/typecheck.sh
# glimpse/__init__.py extends the package's path at run time, which mypy cannot follow. So mypy
# reads a folder in which links place the packages at their import names.
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
