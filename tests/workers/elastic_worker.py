"""Launched by test_elastic.py on 2 ranks, then on 4, then on 1: every case trains a few steps,
saves, and goes on in the next launch.

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
from glimpse.tests.helpers.tiny import WHOLE
from glimpse.tests.workers.curves_worker import settings, start, steps

ORDER, EACH = (2, 4, 1), 3  # numbers of ranks, steps on each
# A block each, as the conversion takes its time for every tensor; widths of which a quarter is no
# whole number
SIZE = (
    "model.size=custom/8",
    (
        "model.custom={width: 100, depth: 1, heads: 2, text_width: 66, text_depth: 1, text_heads:"
        " 2, embed: 50}"
    ),
)
FROZEN = "model.vision.freeze_patch=true"
# tests/workers/curves_worker.py's name of it, and what is set besides; `second` is MaskCLIP's
# second stage,
# its teacher never changes
METHODS = {
    "clip": ("clip",),
    "maskclip": ("maskclip", FROZEN),
    "second": ("maskclip", FROZEN, "options.contrast=false", "options.teacher=borrowed"),
}
CASES = {
    f"{name} stage {stage} {'bf16' if bf16 else 'fp32'}": (name, stage, bf16)
    for name, stage, bf16 in [
        *product(("clip", "maskclip"), (1, 2, 3), (False, True)),
        ("second", 1, False),
        ("second", 3, True),
    ]
    if WHOLE or stage != 2 or bf16 == (name == "maskclip")
}


def state(trainer: engine.Engine) -> dict[str, torch.Tensor]:
    """{kind and name: the whole tensor} of all that training goes on from; every rank must ask."""
    # DeepSpeed links moments to parameters after its first group's first step, when the others have
    # none
    if trainer.stage < 3:
        trainer.ds.optimizer._hp_optimizer_states_linked = False
        trainer.ds.optimizer._lazy_init_hp_params_optimizer_state()
    found = {f"buffer {name}": buffer for name, buffer in trainer.method.named_buffers()}
    found |= {
        f"residual {i}": torch.as_tensor(module.residual)
        for i, module in enumerate(trainer.temperatures)
    }
    parameters = dict(trainer.method.named_parameters())
    with (
        deepspeed.zero.GatheredParameters(list(parameters.values()))
        if trainer.stage == 3
        else contextlib.nullcontext()
    ):
        found |= {
            f"{'weight' if p.requires_grad else 'frozen'} {name}": p.detach().clone()
            for name, p in parameters.items()
        }
    for name, parameter in trainer.trainable.items():
        found[f"fp32 {name}"] = safe_get_full_fp32_param(parameter)
        found |= {
            f"{key} {name}": safe_get_full_optimizer_state(parameter, key)
            for key in ("exp_avg", "exp_avg_sq")
        }
    for name, kept in trainer.average.kept.items():
        shape = ema.shape(trainer.average.pairs[name][0])
        found[f"average {name}"] = (
            joined(kept)[: shape.numel()].view(shape) if trainer.stage == 3 else kept.view(shape)
        )
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def joined(shard: torch.Tensor) -> torch.Tensor:
    every = [torch.empty_like(shard) for _ in range(distributed.world())]
    dist.all_gather(every, shard)
    return torch.cat(every)


def counters(trainer: engine.Engine) -> list[int]:
    """The different step counts of the optimizer's groups on all ranks, and the engine's own."""
    own = [
        int(kept["step"])
        for kept in trainer.ds.optimizer.optimizer.state.values()
        if "step" in kept
    ]
    return sorted(
        {*distributed.gathered(own), trainer.ds.global_steps, trainer.samples // trainer.batch}
    )


def rules(trainer: engine.Engine) -> list[list]:
    """What the optimizer does with each group."""
    return [
        [group["weight_decay"], *group["betas"], group["eps"]]
        for group in trainer.ds.optimizer.param_groups
    ]


def zeroed(method: torch.nn.Module) -> None:
    """Nothing is in place before it was loaded."""
    for parameter in method.parameters():
        engine.own_part(parameter).zero_()


def moved(cfg, home: Path) -> tuple:
    """An engine that goes on from another number of ranks; which of the saved state it has not, bit
    for bit, on any rank.
    """
    path = checkpoint.newest(home)
    universal = elastic.prepare_elastic(path, distributed.world())
    trainer, batches = start(cfg, universal=universal is not None, load=zeroed)
    elastic.resume(trainer, path, universal)
    saved, mine = torch.load(home / "state.pt"), state(trainer)
    assert saved.keys() == mine.keys()
    other = [name for name in saved if not torch.equal(saved[name], mine[name])]
    found = dict(
        other=sorted(set(distributed.gathered(other))),
        kinds=Counter(name.split()[0] for name in saved),
        resumed=counters(trainer),
        moments=max(
            float(saved[name].abs().max()) for name in saved if name.startswith("exp_avg ")
        ),
    )
    return trainer, batches, found


def case(data: Path, name: str, stage: int, bf16: bool) -> dict:
    world, home = distributed.world(), data / f"{name}-{stage}-{bf16}"
    cfg = settings(data, METHODS[name][0], stage, *SIZE, *METHODS[name][1:], bf16=bf16)
    trainer, batches, found = (*start(cfg), {}) if world == ORDER[0] else moved(cfg, home)
    last = EACH * cfg.batch * (1 + ORDER.index(world))
    found |= dict(
        losses=list(steps(cfg, trainer, batches, last)),
        counters=counters(trainer),
        rules=rules(trainer),
    )
    if world != ORDER[-1]:
        path = checkpoint.save(trainer, home / "checkpoints", dict(identity={}, shards=0), keep=1)
        kept = state(trainer)
        if distributed.rank() == 0:
            torch.save(kept, path.parents[1] / "state.pt")
    if world == ORDER[0]:  # and as if nothing had happened
        found["straight"] = found["losses"] + list(
            steps(cfg, trainer, batches, len(ORDER) * EACH * cfg.batch)
        )
    trainer.ds.destroy()
    return found


def main() -> None:
    data, out = [arg for arg in sys.argv[1:] if not arg.startswith("--local_rank")]
    distributed.start()
    found = {name: case(Path(data), *how) for name, how in CASES.items()}
    if distributed.rank() == 0:
        Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    distributed.run_script(main)
