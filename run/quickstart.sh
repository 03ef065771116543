#!/usr/bin/env bash
# From a clone to an evaluated FLIP model in a few minutes: environment, data, tokenizer, training
# under ZeRO-3, evaluation.
#   bash run/quickstart.sh
# An environment, data and a tokenizer that are there already are used again; every call trains into
# a new run folder.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf '\n\033[1m== %s\033[0m\n' "$*"; }

say "environment (.venv)"
[ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS=1
if ! cmp -s requirements.txt .venv/installed.txt; then
  pip install --quiet --disable-pip-version-check -r requirements.txt
  cp requirements.txt .venv/installed.txt
fi

say "data (datasets/glyphs): emoji drawn in ten styles, with their names"
python run/prepare.py glyphs --out datasets/glyphs
tokenizer=datasets/glyphs-tokenizer.model
if [ ! -e "$tokenizer" ]; then
  python run/prepare.py tokenizer datasets/glyphs/train --out "$tokenizer" --vocab-size 2000
fi

run=runs/quickstart
for ((n = 2; ; n++)); do
  [ -e "$run" ] || break
  run=runs/quickstart-$n
done
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
# nproc would print OMP_NUM_THREADS
cores=$(python -c 'import os; print(len(os.sched_getaffinity(0)))')
ranks=$((gpus > 0 ? gpus : cores > 1 ? 2 : 1))
while ((256 % ranks)); do ranks=$((ranks - 1)); done  # the config's batch divides evenly
[ "$gpus" -gt 0 ] || export DS_ACCELERATOR=cpu

say "training on $ranks ranks ($run)"
deepspeed --quiet --num_accelerators "$ranks" run/pretrain.py \
  --config run/configs/quickstart.yaml --set "run=$run"

say "done"
cat <<END
The model is in $run:
  config.yaml      what was trained          metrics.jsonl   one record a line
  checkpoints/     to go on from             results.jsonl   the evaluations above
  tensorboard/     tensorboard --logdir $run  (with a picture of what the tower saw)
1x chance is guessing.
Seen and unseen: whether the concept, or the style of drawing, was trained on.
Activate the environment and go on:
  source .venv/bin/activate
  deepspeed --num_accelerators $ranks run/evaluate.py --run $run \\
      --evals retrieval:datasets/glyphs/eval/retrieval
  deepspeed --num_accelerators $ranks run/pretrain.py --config run/configs/quickstart.yaml \\
      --set run=runs/glip "views.image.mask=gaussian(0.5)"
END
