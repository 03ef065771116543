"""Launched by test_teacher.py on 2 ranks and then on 1: teachers beside a plain average, and every
method stopped and gone on with.

    deepspeed --num_accelerators 2 tests/workers/teacher_worker.py DATA OUT.json
"""

import json
import math
import sys
from pathlib import Path

if __package__ is None:  # started as a file: import from the repository root, not from tests/
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param

from glimpse.model import ema
from glimpse.run.lib import distributed
from glimpse.run.train import checkpoint, elastic, zero_reader
from glimpse.tests.helpers.tiny import WHOLE
from glimpse.tests.workers.curves_worker import METHODS, settings, start, steps

LENGTH, SAVED = (50, 40) if WHOLE else (30, 20)  # steps
# as METHODS sets them
MOMENTA = {
    "aclip": lambda t: 1 - 0.1 * (1 + math.cos(math.pi * t)) / 2,
    "maskclip": lambda t: 0.9 + 0.09 * t,
}
LONG = f"samples={LENGTH * 16}"


def whole(parameters: list[torch.nn.Parameter]) -> list[torch.Tensor]:
    """Sharded parameters whole; under fp32, where weights have no other copy."""
    with deepspeed.zero.GatheredParameters(parameters):
        return [parameter.detach().clone() for parameter in parameters]


class Plain:
    """The moving average as the formula has it, of whole fp32 tensors."""

    def __init__(self, trainer, name: str, kept: list | None = None):
        pairs = ema.parameters(trainer.method.averaged()).values()
        self.teachers, self.students = (
            [teacher for teacher, _ in pairs],
            [student for _, student in pairs],
        )
        self.momentum, self.kept = MOMENTA[name], kept or whole(self.students)

    def follow(self, step: int) -> None:
        m = self.momentum(step / LENGTH)
        self.kept = [
            m * kept + (1 - m) * student for kept, student in zip(self.kept, whole(self.students))
        ]

    def apart(self) -> float:
        """The largest difference from the teacher's weights, all of them."""
        return furthest(self.kept, whole(self.teachers))

    def moved(self) -> float:
        """The largest difference of teacher and student."""
        return furthest(whole(self.teachers), whole(self.students))


def furthest(these: list[torch.Tensor], those: list[torch.Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(these, those, strict=True))


def followed(cfg, name: str, trainer, batches, plain: Plain, until: int) -> list[float]:
    losses = []
    for loss in steps(cfg, trainer, batches, until * cfg.batch):
        losses.append(loss)
        plain.follow(trainer.ds.global_steps)
    return losses


def teacher(data: Path, name: str) -> dict:
    """On 2 ranks: LENGTH steps beside the plain average, with a checkpoint on the way, from which
    one more engine goes on.
    """
    cfg = settings(data, name, 3, LONG)
    trainer, batches = start(cfg)
    plain = Plain(trainer, name)
    begun = plain.apart()
    followed(cfg, name, trainer, batches, plain, SAVED)
    path = checkpoint.save(
        trainer, data / name / "checkpoints", dict(identity={}, shards=0), keep=1
    )
    torch.save(plain.kept, data / name / "plain.pt")
    straight = followed(cfg, name, trainer, batches, plain, LENGTH)
    kept = trainer.average.kept
    found = dict(
        begun=begun,
        apart=plain.apart(),
        moved=plain.moved(),
        straight=straight,
        share=sum(x.numel() for x in kept.values()) / sum(x.numel() for x in plain.kept),
        held=sum(t.ds_tensor.numel() for t in plain.teachers)
        / sum(x.numel() for x in kept.values()),
        optimized=sum(
            state["exp_avg"].numel()
            for state in trainer.ds.optimizer.optimizer.state.values()
            if "exp_avg" in state
        ),
        trainable=sum(p.ds_numel for p in trainer.method.parameters() if p.requires_grad),
    )
    trainer.ds.destroy()
    again, batches = start(cfg)
    elastic.resume(again, path, None)
    found["resumed"] = list(steps(cfg, again, batches, cfg.samples))
    found["same teacher"] = all(torch.equal(kept[key], again.average.kept[key]) for key in kept)
    again.ds.destroy()
    return found


def elsewhere(data: Path, name: str) -> dict:
    """On 1 rank: the last steps again, from the checkpoint of 2."""
    cfg = settings(data, name, 3, LONG)
    trainer, batches, found = moved(data, name, cfg)
    plain = Plain(trainer, name, torch.load(data / name / "plain.pt"))
    found |= dict(
        begun=plain.apart(),
        losses=followed(cfg, name, trainer, batches, plain, LENGTH),
        apart=plain.apart(),
    )
    trainer.ds.destroy()
    return found


def moved(data: Path, name: str, cfg) -> tuple:
    """An engine on 1 rank that goes on from 2; how much of the averages is bit for bit as it was
    saved.
    """
    path = checkpoint.newest(data / name)
    trainer, batches = start(cfg, universal=True)
    elastic.resume(trainer, path, elastic.prepare_elastic(path, 1))
    kept = {
        key: value.view(ema.shape(trainer.average.pairs[key][0]))
        for key, value in trainer.average.kept.items()
    }
    saved = zero_reader.averages(path, {key: value.shape for key, value in kept.items()})
    return (
        trainer,
        batches,
        {"same teacher": all(torch.equal(kept[key], saved[key]) for key in kept)},
    )


def rounded(data: Path) -> dict:
    """MaskCLIP at stage 1 in bf16, where rank 0 alone keeps the averages: how it goes on from a
    converted checkpoint, on either number.

    Of the group without weight decay, one number, the second of two ranks has nothing but padding.
    """
    cfg, name = (
        settings(data, "maskclip", 1, LONG, "optim.no_decay=[logit_scale]", bf16=True),
        "rounded",
    )
    if distributed.world() == 1:
        trainer, batches, found = moved(data, name, cfg)
        saved = zero_reader.weights(checkpoint.newest(data / name))
        found["same weights"] = all(
            torch.equal(safe_get_full_fp32_param(p), saved[key])
            for key, p in trainer.trainable.items()
        )
        found["losses"] = list(steps(cfg, trainer, batches, 10 * cfg.batch))
        trainer.ds.destroy()
        return found
    trainer, batches = start(cfg)
    list(steps(cfg, trainer, batches, 4 * cfg.batch))
    path = checkpoint.save(
        trainer, data / name / "checkpoints", dict(identity={}, shards=0), keep=1
    )
    found = dict(straight=list(steps(cfg, trainer, batches, 10 * cfg.batch)))
    trainer.ds.destroy()
    again, batches = start(cfg, universal=True)
    # as for another number of ranks, though there are as many
    elastic.resume(again, path, elastic.prepare_elastic(path, 3))
    found["resumed"] = list(steps(cfg, again, batches, 10 * cfg.batch))
    again.ds.destroy()
    return found


def resumed(data: Path, name: str) -> dict:
    """Methods without an average: eight steps with a checkpoint half way; and the last four again
    by another engine.
    """
    cfg = settings(data, name, 3)
    trainer, batches = start(cfg)
    list(steps(cfg, trainer, batches, 4 * cfg.batch))
    path = checkpoint.save(
        trainer, data / name / "checkpoints", dict(identity={}, shards=0), keep=1
    )
    found = dict(straight=list(steps(cfg, trainer, batches, 8 * cfg.batch)))
    trainer.ds.destroy()
    again, batches = start(cfg)
    elastic.resume(again, path, None)
    found["resumed"] = list(steps(cfg, again, batches, 8 * cfg.batch))
    again.ds.destroy()
    return found


def main() -> None:
    data, out = [arg for arg in sys.argv[1:] if not arg.startswith("--local_rank")]
    distributed.start()
    if distributed.world() == 1:
        found = {name: elsewhere(Path(data), name) for name in MOMENTA}
        found["rounded"] = rounded(Path(data))
    else:
        found = {name: teacher(Path(data), name) for name in MOMENTA}
        found |= {name: resumed(Path(data), name) for name in METHODS if name not in MOMENTA}
        found["rounded"] = rounded(Path(data))
    if distributed.rank() == 0:
        Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    distributed.run_script(main)
