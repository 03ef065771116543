"""Launched by test_teacher.py on 2 ranks and then on 1.

Teachers are compared with an average that is computed on full fp32 tensors. The methods without a
teacher are saved and resumed.

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

STEPS, SAVED_STEP = (50, 40) if RUN_EVERYTHING else (30, 20)


# The momenta that curves_worker.METHODS configures; t: progress of the training, 0 to 1.
def cosine_momentum(t: float) -> float:
    return 1 - 0.1 * (1 + math.cos(math.pi * t)) / 2


def linear_momentum(t: float) -> float:
    return 0.9 + 0.09 * t


MOMENTA = {"aclip": cosine_momentum, "maskclip": linear_momentum}
LONG = f"samples={STEPS * 16}"


def gather_full(parameters: list[torch.nn.Parameter]) -> list[torch.Tensor]:
    """Gather sharded parameters, and return copies."""
    with deepspeed.zero.GatheredParameters(parameters):
        return [parameter.detach().clone() for parameter in parameters]


class PlainAverage:
    """The moving average, computed by its formula on full fp32 tensors."""

    def __init__(self, trainer, name: str, averages: list | None = None):
        pairs = ema.pair_parameters(trainer.method.ema_pairs()).values()
        self.teachers = [teacher for teacher, _ in pairs]
        self.students = [student for _, student in pairs]
        self.momentum = MOMENTA[name]
        self.averages = averages or gather_full(self.students)

    def update(self, step: int) -> None:
        """Update the average after a step."""
        m = self.momentum(step / STEPS)
        for i, student in enumerate(gather_full(self.students)):
            self.averages[i] = m * self.averages[i] + (1 - m) * student

    def teacher_difference(self) -> float:
        """Return the largest difference from the teacher's weights."""
        return largest_difference(self.averages, gather_full(self.teachers))

    def student_difference(self) -> float:
        """Return the largest difference between teacher and student."""
        return largest_difference(gather_full(self.teachers), gather_full(self.students))


def largest_difference(tensors: list[torch.Tensor], others: list[torch.Tensor]) -> float:
    differences = [(a - b).abs().max() for a, b in zip(tensors, others, strict=True)]
    return max(map(float, differences))


def train_with_average(cfg, trainer, batches, average: PlainAverage, last_step: int) -> list[float]:
    """Train until a step, updating the plain average after each, and return the losses."""
    losses = []
    for loss in train_until(cfg, trainer, batches, last_step * cfg.batch):
        losses.append(loss)
        average.update(trainer.ds.global_steps)
    return losses


def train_teacher(data: Path, name: str) -> dict:
    """Train STEPS steps on 2 ranks, and the last of them again from a checkpoint."""
    # Train, with a checkpoint at SAVED_STEP.
    cfg = tiny_config(data, name, 3, LONG)
    trainer, batches = build_trainer(cfg)
    plain = PlainAverage(trainer, name)
    results = {"initial difference": plain.teacher_difference()}
    train_with_average(cfg, trainer, batches, plain, SAVED_STEP)
    path = checkpoint.save(
        trainer, data / name / "checkpoints", dict(identity={}, shards=0), keep=1
    )
    torch.save(plain.averages, data / name / "plain.pt")
    results["uninterrupted"] = train_with_average(cfg, trainer, batches, plain, STEPS)
    results["final difference"] = plain.teacher_difference()
    results["student difference"] = plain.student_difference()

    # Elements of this rank's averages, as a share of the full averages and of its shards of the
    # teacher; elements that the optimizer updates.
    averages = trainer.averages.values
    average_size = sum(tensor.numel() for tensor in averages.values())
    results["share"] = average_size / sum(tensor.numel() for tensor in plain.averages)
    results["share of shards"] = sum(t.ds_tensor.numel() for t in plain.teachers) / average_size
    states = trainer.ds.optimizer.optimizer.state.values()
    moments = [state["exp_avg"] for state in states if "exp_avg" in state]
    results["optimized"] = sum(moment.numel() for moment in moments)
    trainable = [p for p in trainer.method.parameters() if p.requires_grad]
    results["trainable"] = sum(p.ds_numel for p in trainable)
    trainer.ds.destroy()

    # Resume in a new engine.
    resumed, batches = build_trainer(cfg)
    elastic.resume(resumed, path, None)
    results["resumed"] = list(train_until(cfg, resumed, batches, cfg.samples))
    results["same teacher"] = equal(averages, resumed.averages.values)
    resumed.ds.destroy()
    return results


def equal(tensors: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> bool:
    """Return True if all tensors are equal, bit for bit."""
    return all(torch.equal(tensor, others[key]) for key, tensor in tensors.items())


def resume_on_one_rank(data: Path, name: str) -> dict:
    """Train the last steps again on 1 rank, from the checkpoint of 2 ranks."""
    cfg = tiny_config(data, name, 3, LONG)
    trainer, batches, results = resume_from_two_ranks(data, name, cfg)
    plain = PlainAverage(trainer, name, torch.load(data / name / "plain.pt"))
    results["initial difference"] = plain.teacher_difference()
    results["losses"] = train_with_average(cfg, trainer, batches, plain, STEPS)
    results["final difference"] = plain.teacher_difference()
    trainer.ds.destroy()
    return results


def resume_from_two_ranks(data: Path, name: str, cfg) -> tuple:
    """Return (engine, batches, results) on 1 rank, resumed from the checkpoint of 2 ranks.

    results["same teacher"]: whether the averages are those that were saved, bit for bit.
    """
    path = checkpoint.newest_checkpoint(data / name)
    trainer, batches = build_trainer(cfg, universal=True)
    elastic.resume(trainer, path, elastic.prepare_elastic(path, 1))
    averages = {}
    for key, value in trainer.averages.values.items():
        averages[key] = value.view(ema.full_shape(trainer.averages.pairs[key][0]))
    shapes = {key: value.shape for key, value in averages.items()}
    saved = zero_reader.read_averages(path, shapes)
    return trainer, batches, {"same teacher": equal(averages, saved)}


def train_bf16_stage1(data: Path) -> dict:
    """Train MaskCLIP at stage 1 in bf16, where only rank 0 has the averages.

    It is resumed from a converted checkpoint, on 2 ranks and on 1. The group without weight decay
    has a single element, so the second of two ranks has only padding of it.
    """
    name = "bf16"
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
    results = dict(uninterrupted=list(train_until(cfg, trainer, batches, 10 * cfg.batch)))
    trainer.ds.destroy()

    # Convert although the number of ranks is the same, by passing another number.
    resumed, batches = build_trainer(cfg, universal=True)
    elastic.resume(resumed, path, elastic.prepare_elastic(path, 3))
    results["resumed"] = list(train_until(cfg, resumed, batches, 10 * cfg.batch))
    resumed.ds.destroy()
    return results


def train_and_resume(data: Path, name: str) -> dict:
    """Train a method without a teacher; repeat its last four steps from a checkpoint."""
    cfg = tiny_config(data, name, 3)
    trainer, batches = build_trainer(cfg)
    list(train_until(cfg, trainer, batches, 4 * cfg.batch))
    path = checkpoint.save(
        trainer, data / name / "checkpoints", dict(identity={}, shards=0), keep=1
    )
    results = dict(uninterrupted=list(train_until(cfg, trainer, batches, 8 * cfg.batch)))
    trainer.ds.destroy()

    resumed, batches = build_trainer(cfg)
    elastic.resume(resumed, path, None)
    results["resumed"] = list(train_until(cfg, resumed, batches, 8 * cfg.batch))
    resumed.ds.destroy()
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
    results["bf16"] = train_bf16_stage1(Path(data))
    if distributed.rank() == 0:
        Path(out).write_text(json.dumps(results))


if __name__ == "__main__":
    distributed.run_script(main)
