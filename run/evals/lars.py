"""LARS (You et al. 2017, arXiv 1708.03888), as MoCo v3 and MAE use it.

A learning rate for each layer, for batches of thousands.
"""

from collections.abc import Iterable

import torch


class LARS(torch.optim.Optimizer):
    """SGD with momentum, its step on a matrix scaled by trust x |weights| / |gradient|.

    1-d parameters take the plain step, without weight decay. As in the code of MoCo v3 and MAE,
    momentum accumulates scaled steps and the learning rate is applied last, where the paper applies
    the rate before the momentum.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 0.0,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        trust: float = 0.001,
    ):
        defaults = dict(lr=lr, weight_decay=weight_decay, momentum=momentum, trust=trust)
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                step = p.grad
                if p.ndim > 1:
                    step = step + group["weight_decay"] * p
                    weights = p.norm()
                    gradient = step.norm()
                    ratio = group["trust"] * weights / gradient
                    step = step * torch.where(weights * gradient > 0, ratio, 1.0)
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.mul_(group["momentum"]).add_(step)
                p.sub_(group["lr"] * momentum)
