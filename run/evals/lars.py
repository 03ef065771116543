"""LARS (You et al. 2017, arXiv 1708.03888), as MoCo v3 and MAE use it: a rate for each layer, for
batches of thousands.
"""

import torch


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose step on a matrix is scaled by trust x |weights| / |gradient|; what is
    1-d takes the plain step, undecayed.

    As in their code, momentum gathers scaled steps and the learning rate comes last, where the
    paper puts the rate before the momentum.
    """

    def __init__(
        self,
        params,
        lr: float = 0.0,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        trust: float = 0.001,
    ):
        super().__init__(
            params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum, trust=trust)
        )

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                step = p.grad
                if p.ndim > 1:
                    step = step + group["weight_decay"] * p
                    weights, gradient = p.norm(), step.norm()
                    step = step * torch.where(
                        weights * gradient > 0, group["trust"] * weights / gradient, 1.0
                    )
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.mul_(group["momentum"]).add_(step)
                p.sub_(group["lr"] * momentum)
