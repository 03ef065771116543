"""Launched by test_teacher.py on 2 ranks and then on 1: teachers beside a plain average.

Every other method is stopped and gone on with.

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
from glimpse.tests.helpers.tiny import RUN_EVERYTHING
from glimpse.tests.workers.curves_worker import METHODS, build_trainer, tiny_config, train_until

STEPS, SAVED_STEP = (50, 40) if RUN_EVERYTHING else (30, 20)  # steps


# The momenta as curves_worker.METHODS sets them; t: the share of training that is done.
def cosine_momentum(t: float) -> float:
    return 1 - 0.1 * (1 + math.cos(math.pi * t)) / 2


def linear_momentum(t: float) -> float:
    return 0.9 + 0.09 * t


MOMENTA = {"aclip": cosine_momentum, "maskclip": linear_momentum}
LONG = f"samples={STEPS * 16}"


def gather_full(parameters: list[torch.nn.Parameter]) -> list[torch.Tensor]:
    """Gather sharded parameters, and return copies; under fp32, weights have no other copy."""
    with deepspeed.zero.GatheredParameters(parameters):
        return [parameter.detach().clone() for parameter in parameters]


class PlainAverage:
    """The moving average as the formula has it, of full fp32 tensors."""

    def __init__(self, trainer, name: str, kept: list | None = None):
        pairs = ema.parameters(trainer.method.ema_pairs()).values()
        self.teachers = [teacher for teacher, _ in pairs]
        self.students = [student for _, student in pairs]
        self.momentum = MOMENTA[name]
        self.kept = kept or gather_full(self.students)

    def follow(self, step: int) -> None:
        """Update the average after a step."""
        m = self.momentum(step / STEPS)
        for i, student in enumerate(gather_full(self.students)):
            self.kept[i] = m * self.kept[i] + (1 - m) * student

    def apart(self) -> float:
        """Return the largest difference from the teacher's weights, all of them."""
        return largest_difference(self.kept, gather_full(self.teachers))

    def moved(self) -> float:
        """Return the largest difference of teacher and student."""
        return largest_difference(gather_full(self.teachers), gather_full(self.students))


def largest_difference(these: list[torch.Tensor], those: list[torch.Tensor]) -> float:
    differences = [(a - b).abs().max() for a, b in zip(these, those, strict=True)]
    return max(map(float, differences))


def train_with_average(
    cfg, name: str, trainer, batches, plain: PlainAverage, until: int
) -> list[float]:
    """Train until that step beside the plain average, and return the losses."""
    losses = []
    for loss in train_until(cfg, trainer, batches, until * cfg.batch):
        losses.append(loss)
        plain.follow(trainer.ds.global_steps)
    return losses


def train_teacher(data: Path, name: str) -> dict:
    """Train LENGTH steps on 2 ranks beside the plain average.

    Another engine goes on from a checkpoint on the way.
    """
    cfg = tiny_config(data, name, 3, LONG)
    trainer, batches = build_trainer(cfg)
    plain = PlainAverage(trainer, name)
    results = {"begun": plain.apart()}
    train_with_average(cfg, name, trainer, batches, plain, SAVED_STEP)
    path = checkpoint.save(
        trainer, data / name / "checkpoints", dict(identity={}, shards=0), keep=1
    )
    torch.save(plain.kept, data / name / "plain.pt")
    results["straight"] = train_with_average(cfg, name, trainer, batches, plain, STEPS)
    results["apart"] = plain.apart()
    results["moved"] = plain.moved()

    # Sizes: of this rank's averages, to the full ones and to its shards of the teacher; and of what
    # the optimizer updates.
    averages = trainer.averages.kept
    average_size = sum(tensor.numel() for tensor in averages.values())
    results["share"] = average_size / sum(tensor.numel() for tensor in plain.kept)
    results["held"] = sum(t.ds_tensor.numel() for t in plain.teachers) / average_size
    states = trainer.ds.optimizer.optimizer.state.values()
    moments = [state["exp_avg"] for state in states if "exp_avg" in state]
    results["optimized"] = sum(moment.numel() for moment in moments)
    trainable = [p for p in trainer.method.parameters() if p.requires_grad]
    results["trainable"] = sum(p.ds_numel for p in trainable)
    trainer.ds.destroy()

    again, batches = build_trainer(cfg)
    elastic.resume(again, path, None)
    results["resumed"] = list(train_until(cfg, again, batches, cfg.samples))
    results["same teacher"] = equal(averages, again.averages.kept)
    again.ds.destroy()
    return results


def equal(tensors: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, others[key]) for key, tensor in tensors.items())


def resume_on_one_rank(data: Path, name: str) -> dict:
    """Train the last steps again on 1 rank, from the checkpoint of 2."""
    cfg = tiny_config(data, name, 3, LONG)
    trainer, batches, results = resume_from_two_ranks(data, name, cfg)
    plain = PlainAverage(trainer, name, torch.load(data / name / "plain.pt"))
    results["begun"] = plain.apart()
    results["losses"] = train_with_average(cfg, name, trainer, batches, plain, STEPS)
    results["apart"] = plain.apart()
    trainer.ds.destroy()
    return results


def resume_from_two_ranks(data: Path, name: str, cfg) -> tuple:
    """Return an engine on 1 rank that goes on from 2, its batches, and what differs.

    That is whether the averages are bit for bit as they were saved.
    """
    path = checkpoint.newest_checkpoint(data / name)
    trainer, batches = build_trainer(cfg, universal=True)
    elastic.resume(trainer, path, elastic.prepare_elastic(path, 1))
    averages = {}
    for key, value in trainer.averages.kept.items():
        averages[key] = value.view(ema.shape(trainer.averages.pairs[key][0]))
    shapes = {key: value.shape for key, value in averages.items()}
    saved = zero_reader.read_averages(path, shapes)
    return trainer, batches, {"same teacher": equal(averages, saved)}


def train_bf16_stage1(data: Path) -> dict:
    """Train MaskCLIP at stage 1 in bf16, where rank 0 alone keeps the averages.

    It goes on from a converted checkpoint, on either number of ranks. Of the group without weight
    decay, one number, the second of two ranks has nothing but padding.
    """
    name = "rounded"
    cfg = tiny_config(data, "maskclip", 1, LONG, "optim.no_decay=[logit_scale]", bf16=True)
    if distributed.world_size() == 1:
        trainer, batches, results = resume_from_two_ranks(data, name, cfg)
        saved = zero_reader.read_weights(checkpoint.newest_checkpoint(data / name))
        weights = {}
        for key, parameter in trainer.trainable.items():
            weights[key] = safe_get_full_fp32_param(parameter)
        results["same weights"] = equal(weights, saved)
        results["losses"] = list(train_until(cfg, trainer, batches, 10 * cfg.batch))
        trainer.ds.destroy()
        return results

    trainer, batches = build_trainer(cfg)
    list(train_until(cfg, trainer, batches, 4 * cfg.batch))
    path = checkpoint.save(
        trainer, data / name / "checkpoints", dict(identity={}, shards=0), keep=1
    )
    results = dict(straight=list(train_until(cfg, trainer, batches, 10 * cfg.batch)))
    trainer.ds.destroy()

    again, batches = build_trainer(cfg, universal=True)
    # as for another number of ranks, though there are as many
    elastic.resume(again, path, elastic.prepare_elastic(path, 3))
    results["resumed"] = list(train_until(cfg, again, batches, 10 * cfg.batch))
    again.ds.destroy()
    return results


def train_and_resume(data: Path, name: str) -> dict:
    """Train eight steps of a method without an average, with a checkpoint half way.

    Another engine takes the last four again.
    """
    cfg = tiny_config(data, name, 3)
    trainer, batches = build_trainer(cfg)
    list(train_until(cfg, trainer, batches, 4 * cfg.batch))
    path = checkpoint.save(
        trainer, data / name / "checkpoints", dict(identity={}, shards=0), keep=1
    )
    results = dict(straight=list(train_until(cfg, trainer, batches, 8 * cfg.batch)))
    trainer.ds.destroy()

    again, batches = build_trainer(cfg)
    elastic.resume(again, path, None)
    results["resumed"] = list(train_until(cfg, again, batches, 8 * cfg.batch))
    again.ds.destroy()
    return results


def main() -> None:
    data, out = [arg for arg in sys.argv[1:] if not arg.startswith("--local_rank")]
    distributed.start()
    results = {}
    for name in MOMENTA:
        run = resume_on_one_rank if distributed.world_size() == 1 else train_teacher
        results[name] = run(Path(data), name)
    if distributed.world_size() > 1:
        for name in METHODS:
            if name not in MOMENTA:
                results[name] = train_and_resume(Path(data), name)
    results["rounded"] = train_bf16_stage1(Path(data))
    if distributed.rank() == 0:
        Path(out).write_text(json.dumps(results))


if __name__ == "__main__":
    distributed.run_script(main)
