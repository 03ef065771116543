"""LARS (You et al. 2017, arXiv 1708.03888) as in MoCo v3 and MAE.

It scales the learning rate of each layer, which allows batches of thousands of samples.
"""

from collections.abc import Iterable

import torch


class LARS(torch.optim.Optimizer):
    """SGD with momentum, in which each matrix's step is scaled by trust * |weights| / |gradient|.

    1-d parameters take plain SGD steps without weight decay. As in the code of MoCo v3 and MAE,
    momentum accumulates the scaled steps and is multiplied by the learning rate at the end. The
    paper multiplies before the momentum.
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
        """Update the parameters; each must have a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                step = p.grad
                if p.ndim > 1:
                    step = step + group["weight_decay"] * p
                    weight_norm = p.norm()
                    step_norm = step.norm()
                    ratio = group["trust"] * weight_norm / step_norm
                    # The ratio is 0 or nan if a norm is 0; take a plain step then.
                    step = step * torch.where(weight_norm * step_norm > 0, ratio, 1.0)
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.mul_(group["momentum"]).add_(step)
                p.sub_(group["lr"] * momentum)
