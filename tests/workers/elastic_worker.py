"""Launched by test_elastic.py on 2 ranks, then on 4, then on 1.

Every case trains a few steps, saves, and goes on in the next launch.

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

RANK_COUNTS = (2, 4, 1)  # numbers of ranks
STEPS_PER_LAUNCH = 3  # steps on each
# A block each, as the conversion takes its time for every tensor; widths of which a quarter is no
# whole number
SIZE = (
    "model.size=custom/8",
    "model.custom={width: 100, depth: 1, heads: 2, text_width: 66, text_depth: 1, text_heads: 2,"
    " embed: 50}",
)
FROZEN = "model.vision.freeze_patch=true"
# The name in tests/workers/curves_worker.py, and more settings. `second` is MaskCLIP's second
# stage, whose teacher never changes.
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
    # Of stage 2, a short round takes each method in one precision.
    if RUN_EVERYTHING or stage != 2 or bf16 == (name == "maskclip"):
        CASES[f"{name} stage {stage} {'bf16' if bf16 else 'fp32'}"] = (name, stage, bf16)


def full_state(trainer: engine.Engine) -> dict[str, torch.Tensor]:
    """Return {kind and name: the full tensor} of all that training goes on from.

    Every rank must ask.
    """
    # DeepSpeed links moments to parameters after its first group's first step, when the others have
    # none
    if trainer.stage < 3:
        trainer.ds.optimizer._hp_optimizer_states_linked = False
        trainer.ds.optimizer._lazy_init_hp_params_optimizer_state()

    tensors = {}
    for name, buffer in trainer.method.named_buffers():
        tensors[f"buffer {name}"] = buffer
    for i, module in enumerate(trainer.temperatures):
        tensors[f"residual {i}"] = torch.as_tensor(module.residual)

    # The parameters that the forward sees.
    parameters = dict(trainer.method.named_parameters())
    full = contextlib.nullcontext()
    if trainer.stage == 3:
        full = deepspeed.zero.GatheredParameters(list(parameters.values()))
    with full:
        for name, parameter in parameters.items():
            kind = "weight" if parameter.requires_grad else "frozen"
            tensors[f"{kind} {name}"] = parameter.detach().clone()

    # What the optimizer keeps, and the moving averages.
    for name, parameter in trainer.trainable.items():
        tensors[f"fp32 {name}"] = safe_get_full_fp32_param(parameter)
        for key in ("exp_avg", "exp_avg_sq"):
            tensors[f"{key} {name}"] = safe_get_full_optimizer_state(parameter, key)
    for name, average in trainer.averages.kept.items():
        shape = ema.shape(trainer.averages.pairs[name][0])
        full_average = gather_shards(average)[: shape.numel()] if trainer.stage == 3 else average
        tensors[f"average {name}"] = full_average.view(shape)
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def gather_shards(shard: torch.Tensor) -> torch.Tensor:
    """Join the shards of all ranks, which must all call."""
    every = [torch.empty_like(shard) for _ in range(distributed.world_size())]
    dist.all_gather(every, shard)
    return torch.cat(every)


def step_counters(trainer: engine.Engine) -> list[int]:
    """Return the different step counts of the optimizer's groups on all ranks, and the engine's."""
    states = trainer.ds.optimizer.optimizer.state.values()
    counts = distributed.all_gather_list(
        [int(state["step"]) for state in states if "step" in state]
    )
    return sorted({*counts, trainer.ds.global_steps, trainer.samples // trainer.batch})


def group_settings(trainer: engine.Engine) -> list[list]:
    """Return how the optimizer treats each group."""
    return [
        [group["weight_decay"], *group["betas"], group["eps"]]
        for group in trainer.ds.optimizer.param_groups
    ]


def zero_parameters(method: torch.nn.Module) -> None:
    """Zero the parameters, so that nothing is in place before it is loaded."""
    for parameter in method.parameters():
        engine.local_shard(parameter).zero_()


def resume_on_other_ranks(cfg, home: Path) -> tuple:
    """Return an engine that goes on from another number of ranks, its batches, and what differs.

    That is the part of the saved state that is not the same, bit for bit, on any rank.
    """
    path = checkpoint.newest_checkpoint(home)
    universal = elastic.prepare_elastic(path, distributed.world_size())
    trainer, batches = build_trainer(cfg, universal=universal is not None, load=zero_parameters)
    elastic.resume(trainer, path, universal)

    saved = torch.load(home / "state.pt")
    resumed = full_state(trainer)
    assert saved.keys() == resumed.keys()
    other = [name for name in saved if not torch.equal(saved[name], resumed[name])]
    moments = [saved[name] for name in saved if name.startswith("exp_avg ")]
    results = {}
    results["other"] = sorted(set(distributed.all_gather_list(other)))
    results["kinds"] = Counter(name.split()[0] for name in saved)
    results["resumed"] = step_counters(trainer)
    results["moments"] = max(float(moment.abs().max()) for moment in moments)
    return trainer, batches, results


def run_case(data: Path, name: str, stage: int, bf16: bool) -> dict:
    """Train EACH steps of a case on this number of ranks, and return what the test looks at."""
    world = distributed.world_size()
    home = data / f"{name}-{stage}-{bf16}"
    method, *more = METHODS[name]
    cfg = tiny_config(data, method, stage, *SIZE, *more, bf16=bf16)
    if world == RANK_COUNTS[0]:
        trainer, batches = build_trainer(cfg)
        results = {}
    else:
        trainer, batches, results = resume_on_other_ranks(cfg, home)

    last = STEPS_PER_LAUNCH * cfg.batch * (1 + RANK_COUNTS.index(world))
    results["losses"] = list(train_until(cfg, trainer, batches, last))
    results["counters"] = step_counters(trainer)
    results["rules"] = group_settings(trainer)

    # For the next launch: a checkpoint, and the state that it should give.
    if world != RANK_COUNTS[-1]:
        path = checkpoint.save(trainer, home / "checkpoints", dict(identity={}, shards=0), keep=1)
        saved = full_state(trainer)
        if distributed.rank() == 0:
            torch.save(saved, path.parents[1] / "state.pt")
    if world == RANK_COUNTS[0]:  # and as if nothing had happened
        end = len(RANK_COUNTS) * STEPS_PER_LAUNCH * cfg.batch
        results["straight"] = results["losses"] + list(train_until(cfg, trainer, batches, end))
    trainer.ds.destroy()
    return results


def main() -> None:
    data, out = [arg for arg in sys.argv[1:] if not arg.startswith("--local_rank")]
    distributed.start()
    results = {name: run_case(Path(data), *how) for name, how in CASES.items()}
    if distributed.rank() == 0:
        Path(out).write_text(json.dumps(results))


if __name__ == "__main__":
    distributed.run_script(main)
