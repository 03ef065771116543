"""AdamW's parameter groups, and the learning rate as a function of samples seen.

Groups are told by module type and parameter name, never by `p.ndim`: under ZeRO-3 every parameter
looks one-dimensional.
"""

import math
import re
from dataclasses import dataclass

from torch import nn

from glimpse.model.heads import BatchNorm

KINDS = ("bias", "norm", "positions", "cls", "tokens", "logit_scale", "weight")


@dataclass(frozen=True)
class OptimConfig:
    lr: str  # the peak: absolute ('5e-4'), or by FLIP's rule ('4e-6 per 256': times batch / 256)
    weight_decay: float  # decoupled; FLIP 0.2, CLIP and A-CLIP 0.5 at batch 4096, SLIP 0.1
    warmup: int  # samples over which the rate rises linearly from 0
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    min_lr: float = 0.0  # where the cosine ends
    clip: float = 0.0  # gradient norm; 0: no clipping (DeepSpeed's own default would be 1.0)
    # kinds of parameters that do not decay (FLIP's); all: see KINDS
    no_decay: tuple[str, ...] = ("bias", "norm", "positions")

    def __post_init__(self):
        self.peak(1)
        for kind in self.no_decay:
            if kind not in KINDS:
                raise ValueError(f"optim.no_decay: unknown {kind!r}; known: {', '.join(KINDS)}")

    def peak(self, batch: int) -> float:
        """The peak learning rate for a global batch."""
        match = re.fullmatch(r"([\d.e+-]+)(?: per (\d+))?", self.lr)
        try:
            return float(match[1]) * (batch / int(match[2]) if match[2] else 1)
        except (TypeError, ValueError):
            raise ValueError(f"optim.lr: {self.lr!r}; write 5e-4, or 4e-6 per 256") from None

    def rate(self, seen: int, batch: int, samples: int) -> float:
        """The learning rate of the step that starts with `seen` samples behind it: linear warm-up,
        then cosine to min_lr.
        """
        peak = self.peak(batch)
        if seen < self.warmup:
            return peak * min(1.0, (seen + batch) / self.warmup)
        turn = (seen - self.warmup) / max(1, samples - self.warmup)
        return self.min_lr + (peak - self.min_lr) * (1 + math.cos(math.pi * min(1.0, turn))) / 2


def kind(module: nn.Module, name: str) -> str:
    """What sort of parameter `module.name` is, one of KINDS."""
    if isinstance(module, (nn.LayerNorm, BatchNorm)):
        return "norm"
    if isinstance(module, nn.Embedding):
        return "tokens"
    return name if name in KINDS else "weight"


def groups(model: nn.Module, cfg: OptimConfig) -> list[dict]:
    """Two groups, with and without weight decay, that hold every trainable parameter once."""
    decayed, free = [], []
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                (free if kind(module, name) in cfg.no_decay else decayed).append(parameter)
    assert len(decayed) + len(free) == sum(p.requires_grad for p in model.parameters()), (
        "a parameter is shared or missed"
    )
    both = dict(params=decayed, weight_decay=cfg.weight_decay), dict(params=free, weight_decay=0.0)
    return [group for group in both if group["params"]]
