"""Supervised training loop of probes, fine-tuning and readers.

    losses = fit(trainer, batches, compute_loss, learning_rate, total_steps)

A trainer is called like a module, and has backward(loss), step() and an optimizer: use
`ReplicatedTrainer` or `ExactTrainer` for small modules, or DeepSpeed's engine. `global_batches`
yields the samples of each global batch, the same on every rank, and each rank takes its share. So
the number of ranks does not change the result.

Shapes: N samples, B samples of a global batch, b samples of a rank's share.
"""

import math
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from glimpse.run.lib.distributed import all_reduce_sum, device, rank, world_size


class ReplicatedTrainer:
    """A module replicated on every rank, whose gradients are averaged over the ranks.

    clip: maximum norm of the gradient; 0: no clipping.
    """

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer, clip: float = 0.0):
        self.module = module
        self.optimizer = optimizer
        self.clip = clip
        # Ranks may have initialized the module differently; start from rank 0's weights.
        for value in module.state_dict().values():
            dist.broadcast(value, 0)

    def __call__(self, *inputs: Tensor) -> Tensor:
        return self.module(*inputs)

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients of this rank's share."""
        loss.backward()

    def step(self) -> None:
        """Average the gradients over the ranks and update the weights."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        # One all-reduce for all gradients.
        mean = all_reduce_sum(torch.cat([g.flatten() for g in gradients])) / world_size()
        sizes = [p.numel() for p in parameters]
        for p, g in zip(parameters, mean.split(sizes)):
            p.grad = g.view_as(p)
        if self.clip:
            nn.utils.clip_grad_norm_(parameters, self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()


class ExactTrainer(ReplicatedTrainer):
    """A ReplicatedTrainer with bitwise equal results on any number of ranks.

    The batch is cut into the same slices on any number of ranks, and each slice is computed by one
    rank. Floating-point sums depend on the order of addition, and small differences grow over a
    long run. So gradients are added as integer multiples of 2 ** -40, whose sum does not depend on
    the order. Adam's eps of 1e-8 is ten thousand such units.
    """

    UNIT = 2.0**-40

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer, clip: float = 0.0):
        super().__init__(module, optimizer, clip)
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.sums = [torch.zeros_like(p, dtype=torch.int64) for p in self.parameters]

    def add_gradient(self, loss: Tensor) -> Tensor:
        """Add the gradient of a slice's part of the batch's loss; return that loss, detached."""
        gradients = torch.autograd.grad(loss, self.parameters)
        for units, gradient in zip(self.sums, gradients):
            units.add_((gradient.double() / self.UNIT).round().long())
        return loss.detach()

    def backward(self, loss: Tensor) -> None:
        """Do nothing, because `add_gradient` has added the gradients of the batch's slices."""

    def step(self) -> None:
        """Add the gradients of all ranks and update the weights."""
        sums = all_reduce_sum(torch.cat([units.flatten() for units in self.sums]))
        sizes = [p.numel() for p in self.parameters]
        for p, units, gradient in zip(self.parameters, self.sums, sums.split(sizes)):
            p.grad = (gradient.double() * self.UNIT).to(p.dtype).view_as(p)
            units.zero_()
        if self.clip:
            nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.optimizer.step()


def global_batches(count: int, batch: int, epochs: float, seed: int) -> Iterator[Tensor]:
    """Yield the sample indices (B,) of each step's global batch.

    Every epoch has a new order. A batch that starts in one epoch is filled from the next.
    """
    queue = torch.empty(0, dtype=torch.int64)
    epoch = 0
    for _ in range(count_steps(count, batch, epochs)):
        while len(queue) < batch:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            shuffled = torch.randperm(count, generator=generator)
            queue = torch.cat([queue, shuffled])
            epoch += 1
        yield queue[:batch]
        queue = queue[batch:]


def count_steps(count: int, batch: int, epochs: float) -> int:
    """Return the number of steps of a training on `count` samples, at least 1."""
    return max(1, round(count * epochs / batch))


def rank_share(samples: Tensor) -> Tensor:
    """Return this rank's share of a global batch. The sizes of the shares differ by at most 1."""
    return samples[rank() :: world_size()]


def mean_loss(losses: Tensor, batch: int) -> Tensor:
    """Return the value to backpropagate for the losses (b,) of a share.

    Its mean over the ranks is the mean loss of the global batch of B samples.
    """
    return losses.sum() * world_size() / batch


def fit(
    trainer: nn.Module | ReplicatedTrainer,
    batches: Iterable,
    compute_loss: Callable,
    learning_rate: Callable[[float], float],
    total_steps: int,
    log: Callable[[str], None] | None = None,
) -> list[float]:
    """Train on the batches and return the mean loss of each, over all ranks.

    compute_loss(trainer, batch): returns a loss whose mean over the ranks is the batch's.
    learning_rate(progress): progress is from 0 to 1. A parameter group may have a factor `scale`,
    for layer-wise decay.
    log: called with a line that has the loss, twenty times in all.
    """
    # One tensor, because thousands of small tensors between large ones would fragment the memory.
    losses = torch.zeros(total_steps, device=device())
    interval = max(1, total_steps // 20)
    step = -1
    for step, batch in enumerate(batches):
        for group in trainer.optimizer.param_groups:
            group["lr"] = learning_rate(step / total_steps) * group.get("scale", 1.0)
        loss = compute_loss(trainer, batch)
        trainer.backward(loss)
        trainer.step()
        losses[step] = loss.detach()
        if log and (step + 1) % interval == 0:
            mean = float(all_reduce_sum(losses[step].clone())) / world_size()
            log(f"step {step + 1}/{total_steps}  loss {mean:.6f}")
    return (all_reduce_sum(losses[: step + 1]) / world_size()).tolist()


def cosine_rate(peak: float, warmup: float = 0.0, end: float = 0.0) -> Callable[[float], float]:
    """Return a schedule: linear warm-up from 0 to `peak`, then half a cosine down to `end`.

    warmup: fraction of the training, from 0 to 1.
    """

    def learning_rate(progress: float) -> float:
        if progress < warmup:
            return peak * progress / warmup
        angle = math.pi * (progress - warmup) / (1 - warmup)
        return end + (peak - end) * (1 + math.cos(angle)) / 2

    return learning_rate
