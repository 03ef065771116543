"""The small supervised loop that probes, fine-tuning and heads share: fit(trainer, batches,
loss_of, rate, steps).

A trainer is called like a module, and has backward(loss), step(), and an optimizer: `Replicated` or
`Exact` for what is small, or DeepSpeed's engine. Batches are global: `order` names the samples of
each, the same on every rank, which takes its share, so that the number of ranks does not change
what is learned. Names: N samples, B global batch.
"""

import math
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from glimpse.run.lib.distributed import device, rank, total, world


class Replicated:
    """A module that every rank holds whole; gradients are averaged over the ranks.

    clip: the largest gradient norm, 0 for any.
    """

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer, clip: float = 0.0):
        self.module, self.optimizer, self.clip = module, optimizer, clip
        for value in module.state_dict().values():  # drawn alike or not, they begin as rank 0's
            dist.broadcast(value, 0)

    def __call__(self, *inputs):
        return self.module(*inputs)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        held = [p for group in self.optimizer.param_groups for p in group["params"]]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in held]
        mean = total(torch.cat([g.flatten() for g in gradients])) / world()
        for p, g in zip(held, mean.split([p.numel() for p in held])):
            p.grad = g.view_as(p)
        if self.clip:
            nn.utils.clip_grad_norm_(held, self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()


class Exact(Replicated):
    """Replicated, but to the bit the same on any number of ranks, given the same slices of a batch,
    each learned from by one rank.

    Rounding depends on who adds what to what, and a long training makes much of it. So gradients
    are added as whole numbers of 2 ** -40, whose sum no order changes; Adam's eps of 1e-8 is ten
    thousand of them.
    """

    UNIT = 2.0**-40

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer, clip: float = 0.0):
        super().__init__(module, optimizer, clip)
        self.held = [p for group in optimizer.param_groups for p in group["params"]]
        self.sums = [torch.zeros_like(p, dtype=torch.int64) for p in self.held]

    def learn(self, loss: Tensor) -> Tensor:
        """From a slice's part of the batch's loss, which comes back without its graph."""
        for found, gradient in zip(self.sums, torch.autograd.grad(loss, self.held)):
            found += (gradient.double() / self.UNIT).round().long()
        return loss.detach()

    def backward(self, loss: Tensor) -> None:
        """Of the batch: its slices have been learned from."""

    def step(self) -> None:
        sums = total(torch.cat([found.flatten() for found in self.sums]))
        for p, found, gradient in zip(
            self.held, self.sums, sums.split([p.numel() for p in self.held])
        ):
            p.grad = (gradient.double() * self.UNIT).to(p.dtype).view_as(p)
            found.zero_()
        if self.clip:
            nn.utils.clip_grad_norm_(self.held, self.clip)
        self.optimizer.step()


def order(count: int, batch: int, epochs: float, seed: int) -> Iterator[Tensor]:
    """The samples (B,) of each step, all ranks'; every epoch in a new order, its last batch filled
    from the next.
    """
    queue, epoch = torch.empty(0, dtype=torch.int64), 0
    for _ in range(steps(count, batch, epochs)):
        while len(queue) < batch:
            queue = torch.cat(
                [
                    queue,
                    torch.randperm(
                        count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)
                    ),
                ]
            )
            epoch += 1
        yield queue[:batch]
        queue = queue[batch:]


def steps(count: int, batch: int, epochs: float) -> int:
    return max(1, round(count * epochs / batch))


def mine(samples: Tensor) -> Tensor:
    """This rank's share of a global batch; where it does not divide, shares differ by one."""
    return samples[rank() :: world()]


def mean_loss(losses: Tensor, batch: int) -> Tensor:
    """A share's losses (b,) -> what to give to backward, so that the mean over ranks is that over
    the global batch of B samples.
    """
    return losses.sum() * world() / batch


def fit(
    trainer,
    batches: Iterable,
    loss_of: Callable,
    rate: Callable[[float], float],
    total_steps: int,
    say: Callable[[str], None] | None = None,
) -> list[float]:
    """Train over the batches; loss_of(trainer, batch) -> a loss whose mean over ranks is the
    batch's; returns these means.

    rate(progress, from 0 to 1) -> learning rate; a group's `scale`, where it has one, multiplies it
    (layer-wise decay).
    say: is told the loss, at a twentieth of the steps.
    """
    # not a list: thousands of small tensors between large ones break memory up
    found = torch.zeros(total_steps, device=device())
    step = -1
    for step, batch in enumerate(batches):
        for group in trainer.optimizer.param_groups:
            group["lr"] = rate(step / total_steps) * group.get("scale", 1.0)
        loss = loss_of(trainer, batch)
        trainer.backward(loss)
        trainer.step()
        found[step] = loss.detach()
        if say and (step + 1) % max(1, total_steps // 20) == 0:
            say(
                f"step {step + 1}/{total_steps}  loss"
                f" {float(total(found[step].clone())) / world():.6f}"
            )
    return (total(found[: step + 1]) / world()).tolist()


def cosine(peak: float, warmup: float = 0.0, end: float = 0.0) -> Callable[[float], float]:
    """A learning rate by progress: linear from 0 over the share `warmup`, then half a cosine to
    `end`.
    """

    def rate(progress: float) -> float:
        if progress < warmup:
            return peak * progress / warmup
        return end + (peak - end) * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup))) / 2

    return rate
