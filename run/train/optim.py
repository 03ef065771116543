"""AdamW's parameter groups, and the learning rate as a function of samples seen.

Groups are told by module type and parameter name, never by `p.ndim`: under ZeRO-3 every parameter
looks one-dimensional.
"""

from torch import nn

from glimpse.model.heads import BatchNorm
from glimpse.run.lib.config import KINDS, OptimConfig


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
