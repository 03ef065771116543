#!/usr/bin/env bash
# Train and evaluate a small FLIP model in a few minutes: create a virtual environment, the data and
# a tokenizer, train under ZeRO-3, and evaluate.
#   bash run/quickstart.sh
# An existing environment, data set and tokenizer are reused. Every call trains in a new run folder.
set -euo pipefail
cd "$(dirname "$0")/.."

heading() { printf '\n\033[1m== %s\033[0m\n' "$*"; }

heading "environment (.venv)"
[ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS=1
if ! cmp -s requirements.txt .venv/installed.txt; then
  pip install --quiet --disable-pip-version-check -r requirements.txt
  cp requirements.txt .venv/installed.txt
fi

heading "data (datasets/glyphs): emoji in ten styles, with their names as captions"
python run/prepare.py glyphs --out datasets/glyphs
tokenizer=datasets/glyphs-tokenizer.model
if [ ! -e "$tokenizer" ]; then
  python run/prepare.py tokenizer datasets/glyphs/train --out "$tokenizer" --vocab-size 2000
fi

# The first run folder that does not exist yet.
run=runs/quickstart
for ((n = 2; ; n++)); do
  [ -e "$run" ] || break
  run=runs/quickstart-$n
done

# One rank per GPU, or two ranks on a CPU with several cores.
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
# not nproc, which prints OMP_NUM_THREADS
cores=$(python -c 'import os; print(len(os.sched_getaffinity(0)))')
ranks=$((gpus > 0 ? gpus : cores > 1 ? 2 : 1))
while ((256 % ranks)); do ranks=$((ranks - 1)); done  # the batch of the config must be divisible
[ "$gpus" -gt 0 ] || export DS_ACCELERATOR=cpu

heading "training on $ranks ranks ($run)"
deepspeed --quiet --num_accelerators "$ranks" run/pretrain.py \
  --config run/configs/quickstart.yaml --set "run=$run"

heading "done"
cat <<END
The model is in $run:
  config.yaml      the complete config         metrics.jsonl   training metrics, one record a line
  checkpoints/     for resuming                results.jsonl   the evaluations above
  tensorboard/     tensorboard --logdir $run   (with a picture of the masked inputs)
The results are multiples of chance: 1x chance is guessing.
"seen" and "unseen" concepts and styles: in the training data or not.
Next, activate the environment, evaluate the model, or train one with another mask:
  source .venv/bin/activate
  deepspeed --num_accelerators $ranks run/evaluate.py --run $run \\
      --evals retrieval:datasets/glyphs/eval/retrieval
  deepspeed --num_accelerators $ranks run/pretrain.py --config run/configs/quickstart.yaml \\
      --set run=runs/glip "views.image.mask=gaussian(0.5)"
END
