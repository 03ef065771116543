"""Launched by test_elastic.py on 2 ranks, then on 4, then on 1.

Every case trains a few steps and saves a checkpoint, from which the next launch resumes.

    deepspeed --num_accelerators 2 tests/workers/elastic_worker.py DATA OUT.json
"""

import contextlib
import json
import sys
from collections import Counter
from itertools import product
from pathlib import Path

if __package__ is None:  # started as a file: import from the repository root, not from tests/
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

from glimpse.model import ema
from glimpse.run.lib import distributed
from glimpse.run.train import checkpoint, elastic, engine
from glimpse.tests.helpers.tiny import RUN_EVERYTHING
from glimpse.tests.workers.curves_worker import build_trainer, tiny_config, train_until

RANK_COUNTS = (2, 4, 1)  # of the launches, in order
STEPS_PER_LAUNCH = 3
# One block per tower, because the conversion takes time for every tensor; widths that four ranks do
# not divide evenly.
SIZE = (
    "model.size=custom/8",
    "model.custom={width: 100, depth: 1, heads: 2, text_width: 66, text_depth: 1, text_heads: 2,"
    " embed: 50}",
)
FROZEN = "model.vision.freeze_patch=true"
# {method: (its name in tests/workers/curves_worker.py, *overrides)}. `second` is MaskCLIP's second
# stage, whose teacher is frozen.
METHODS = {
    "clip": ("clip",),
    "maskclip": ("maskclip", FROZEN),
    "second": ("maskclip", FROZEN, "options.contrast=false", "options.teacher=borrowed"),
}
CASES = {}
for name, stage, bf16 in (
    *product(("clip", "maskclip"), (1, 2, 3), (False, True)),
    ("second", 1, False),
    ("second", 3, True),
):
    # Without RUN_EVERYTHING, stage 2 takes one precision for each method.
    if RUN_EVERYTHING or stage != 2 or bf16 == (name == "maskclip"):
        CASES[f"{name} stage {stage} {'bf16' if bf16 else 'fp32'}"] = (name, stage, bf16)


def full_state(trainer: engine.Engine) -> dict[str, torch.Tensor]:
    """Return {"KIND NAME": full tensor} of all state of the training. All ranks must call."""
    # DeepSpeed links moments to parameters after the first step of its first group, when the other
    # groups have none yet: link them again.
    if trainer.stage < 3:
        trainer.ds.optimizer._hp_optimizer_states_linked = False
        trainer.ds.optimizer._lazy_init_hp_params_optimizer_state()

    tensors = {}
    for name, buffer in trainer.method.named_buffers():
        tensors[f"buffer {name}"] = buffer
    for i, module in enumerate(trainer.temperatures):
        tensors[f"residual {i}"] = torch.as_tensor(module.residual)

    # The parameters that the forward uses.
    parameters = dict(trainer.method.named_parameters())
    full = contextlib.nullcontext()
    if trainer.stage == 3:
        full = deepspeed.zero.GatheredParameters(list(parameters.values()))
    with full:
        for name, parameter in parameters.items():
            kind = "weight" if parameter.requires_grad else "frozen"
            tensors[f"{kind} {name}"] = parameter.detach().clone()

    # The optimizer state, and the moving averages.
    for name, parameter in trainer.trainable.items():
        tensors[f"fp32 {name}"] = safe_get_full_fp32_param(parameter)
        for key in ("exp_avg", "exp_avg_sq"):
            tensors[f"{key} {name}"] = safe_get_full_optimizer_state(parameter, key)
    for name, average in trainer.averages.values.items():
        shape = ema.full_shape(trainer.averages.pairs[name][0])
        full_average = gather_shards(average)[: shape.numel()] if trainer.stage == 3 else average
        tensors[f"average {name}"] = full_average.view(shape)
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def gather_shards(shard: torch.Tensor) -> torch.Tensor:
    """Concatenate the shards of all ranks. All ranks must call."""
    shards = [torch.empty_like(shard) for _ in range(distributed.world_size())]
    dist.all_gather(shards, shard)
    return torch.cat(shards)


def step_counters(trainer: engine.Engine) -> list[int]:
    """Return the distinct step counts of the optimizer's parameters on all ranks and the engine."""
    states = trainer.ds.optimizer.optimizer.state.values()
    counts = distributed.all_gather_list(
        [int(state["step"]) for state in states if "step" in state]
    )
    return sorted({*counts, trainer.ds.global_steps, trainer.samples // trainer.batch})


def group_settings(trainer: engine.Engine) -> list[list]:
    """Return the settings of each optimizer group."""
    return [
        [group["weight_decay"], *group["betas"], group["eps"]]
        for group in trainer.ds.optimizer.param_groups
    ]


def zero_parameters(method: torch.nn.Module) -> None:
    """Set all parameters to 0, so that only loading can give them the right values."""
    for parameter in method.parameters():
        engine.local_shard(parameter).zero_()


def resume_on_other_ranks(cfg, folder: Path) -> tuple:
    """Return (engine, batches, results), resumed from the checkpoint of another number of ranks.

    results["different"]: names of the state that differs from the saved state on any rank.
    """
    path = checkpoint.newest_checkpoint(folder)
    universal = elastic.prepare_elastic(path, distributed.world_size())
    trainer, batches = build_trainer(cfg, universal=universal is not None, load=zero_parameters)
    elastic.resume(trainer, path, universal)

    saved = torch.load(folder / "state.pt")
    resumed = full_state(trainer)
    assert saved.keys() == resumed.keys()
    different = [name for name in saved if not torch.equal(saved[name], resumed[name])]
    moments = [saved[name] for name in saved if name.startswith("exp_avg ")]
    results = {}
    results["different"] = sorted(set(distributed.all_gather_list(different)))
    results["kinds"] = Counter(name.split()[0] for name in saved)
    results["resumed"] = step_counters(trainer)
    results["moments"] = max(float(moment.abs().max()) for moment in moments)
    return trainer, batches, results


def run_case(data: Path, name: str, stage: int, bf16: bool) -> dict:
    """Train some steps of a case on this number of ranks, and return the results."""
    ranks = distributed.world_size()
    folder = data / f"{name}-{stage}-{bf16}"
    method, *more = METHODS[name]
    cfg = tiny_config(data, method, stage, *SIZE, *more, bf16=bf16)
    # Start, or resume from the previous launch.
    if ranks == RANK_COUNTS[0]:
        trainer, batches = build_trainer(cfg)
        results = {}
    else:
        trainer, batches, results = resume_on_other_ranks(cfg, folder)

    last = STEPS_PER_LAUNCH * cfg.batch * (1 + RANK_COUNTS.index(ranks))
    results["losses"] = list(train_until(cfg, trainer, batches, last))
    results["counters"] = step_counters(trainer)
    results["group settings"] = group_settings(trainer)

    # Save a checkpoint for the next launch, and the state that it should restore.
    if ranks != RANK_COUNTS[-1]:
        path = checkpoint.save(trainer, folder / "checkpoints", dict(identity={}, shards=0), keep=1)
        saved = full_state(trainer)
        if distributed.rank() == 0:
            torch.save(saved, path.parents[1] / "state.pt")

    # Train the remaining steps without a change of ranks, for comparison.
    if ranks == RANK_COUNTS[0]:
        end = len(RANK_COUNTS) * STEPS_PER_LAUNCH * cfg.batch
        more_losses = list(train_until(cfg, trainer, batches, end))
        results["uninterrupted"] = results["losses"] + more_losses
    trainer.ds.destroy()
    return results


def main() -> None:
    data, out = [arg for arg in sys.argv[1:] if not arg.startswith("--local_rank")]
    distributed.start()
    results = {name: run_case(Path(data), *case) for name, case in CASES.items()}
    if distributed.rank() == 0:
        Path(out).write_text(json.dumps(results))


if __name__ == "__main__":
    distributed.run_script(main)
