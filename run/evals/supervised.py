"""The small supervised loop that probes, fine-tuning and heads share.

    losses = fit(trainer, batches, loss_of, rate, steps)

A trainer is called like a module, and has backward(loss), step(), and an optimizer: `Replicated` or
`Exact` for small modules, or DeepSpeed's engine. Batches are global: `order` yields the samples of
each, the same on every rank, and each rank takes its share, so that the number of ranks does not
change the result. Names: N samples, B global batch.
"""

import math
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from glimpse.run.lib.distributed import all_reduce_sum, device, rank, world_size


class ReplicatedTrainer:
    """A module replicated on every rank; gradients are averaged over the ranks.

    clip: the largest gradient norm, 0 for any.
    """

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer, clip: float = 0.0):
        self.module = module
        self.optimizer = optimizer
        self.clip = clip
        # every rank begins with rank 0's weights, whatever its own initialization
        for value in module.state_dict().values():
            dist.broadcast(value, 0)

    def __call__(self, *inputs: Tensor) -> Tensor:
        return self.module(*inputs)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        # one all-reduce for all gradients
        mean = all_reduce_sum(torch.cat([g.flatten() for g in gradients])) / world_size()
        sizes = [p.numel() for p in parameters]
        for p, g in zip(parameters, mean.split(sizes)):
            p.grad = g.view_as(p)
        if self.clip:
            nn.utils.clip_grad_norm_(parameters, self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()


class ExactTrainer(ReplicatedTrainer):
    """Replicated, but bitwise equal on any number of ranks, given the same slices of a batch.

    Each slice is learned from by one rank. Floating-point sums depend on the order of addition, and
    small differences grow over a long run. So gradients are added as integer multiples of 2 ** -40,
    whose sum does not depend on the order; Adam's eps of 1e-8 is ten thousand of them.
    """

    UNIT = 2.0**-40

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer, clip: float = 0.0):
        super().__init__(module, optimizer, clip)
        self.held = [p for group in optimizer.param_groups for p in group["params"]]
        self.sums = [torch.zeros_like(p, dtype=torch.int64) for p in self.held]

    def learn(self, loss: Tensor) -> Tensor:
        """Add the gradient of a slice's part of the batch's loss; return that loss, detached."""
        gradients = torch.autograd.grad(loss, self.held)
        for units, gradient in zip(self.sums, gradients):
            units.add_((gradient.double() / self.UNIT).round().long())
        return loss.detach()

    def backward(self, loss: Tensor) -> None:
        """Do nothing: `learn` has added the gradients of the batch's slices."""

    def step(self) -> None:
        sums = all_reduce_sum(torch.cat([units.flatten() for units in self.sums]))
        sizes = [p.numel() for p in self.held]
        for p, units, gradient in zip(self.held, self.sums, sums.split(sizes)):
            p.grad = (gradient.double() * self.UNIT).to(p.dtype).view_as(p)
            units.zero_()
        if self.clip:
            nn.utils.clip_grad_norm_(self.held, self.clip)
        self.optimizer.step()


def global_batches(count: int, batch: int, epochs: float, seed: int) -> Iterator[Tensor]:
    """Yield the samples (B,) of each step, of all ranks together.

    Every epoch has a new order, and its last batch is filled from the next epoch.
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
    return max(1, round(count * epochs / batch))


def rank_share(samples: Tensor) -> Tensor:
    """Return this rank's share of a global batch; shares differ by one where it does not divide."""
    return samples[rank() :: world_size()]


def mean_loss(losses: Tensor, batch: int) -> Tensor:
    """Return the value to backpropagate for a share's losses (b,).

    Its mean over the ranks is the mean loss of the global batch of B samples.
    """
    return losses.sum() * world_size() / batch


def fit(
    trainer: nn.Module | ReplicatedTrainer,
    batches: Iterable,
    loss_of: Callable,
    rate: Callable[[float], float],
    total_steps: int,
    say: Callable[[str], None] | None = None,
) -> list[float]:
    """Train over the batches and return the mean loss of each, over all ranks.

    loss_of(trainer, batch) -> a loss whose mean over ranks is the batch's.
    rate(progress, from 0 to 1) -> learning rate; a parameter group's `scale`, if it has one,
    multiplies it (layer-wise decay).
    say: called with a line that has the loss, at a twentieth of the steps.
    """
    # not a list: thousands of small tensors between large ones fragment memory
    losses = torch.zeros(total_steps, device=device())
    interval = max(1, total_steps // 20)
    step = -1
    for step, batch in enumerate(batches):
        for group in trainer.optimizer.param_groups:
            group["lr"] = rate(step / total_steps) * group.get("scale", 1.0)
        loss = loss_of(trainer, batch)
        trainer.backward(loss)
        trainer.step()
        losses[step] = loss.detach()
        if say and (step + 1) % interval == 0:
            mean = float(all_reduce_sum(losses[step].clone())) / world_size()
            say(f"step {step + 1}/{total_steps}  loss {mean:.6f}")
    return (all_reduce_sum(losses[: step + 1]) / world_size()).tolist()


def cosine_rate(peak: float, warmup: float = 0.0, end: float = 0.0) -> Callable[[float], float]:
    """Return a learning rate by progress: linear warm-up from 0, then half a cosine to `end`.

    warmup: its share of the training.
    """

    def rate(progress: float) -> float:
        if progress < warmup:
            return peak * progress / warmup
        angle = math.pi * (progress - warmup) / (1 - warmup)
        return end + (peak - end) * (1 + math.cos(angle)) / 2

    return rate
