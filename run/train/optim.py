"""AdamW's parameter groups, with and without weight decay.

Groups depend on the type of the module and the name of the parameter, not on `p.ndim`: under ZeRO-3
every parameter is one-dimensional.
"""

from torch import nn

from glimpse.model.heads import CrossRankBatchNorm
from glimpse.run.lib.config import PARAMETER_KINDS, OptimConfig


def parameter_kind(module: nn.Module, name: str) -> str:
    """Return the kind of the parameter `module.name`, one of PARAMETER_KINDS."""
    if isinstance(module, (nn.LayerNorm, CrossRankBatchNorm)):
        return "norm"
    if isinstance(module, nn.Embedding):
        return "tokens"
    return name if name in PARAMETER_KINDS else "weight"


def parameter_groups(model: nn.Module, cfg: OptimConfig) -> list[dict]:
    """Return the groups with and without decay, which hold every trainable parameter once.

    A group without parameters is left out.
    """
    decayed: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            if parameter_kind(module, name) in cfg.no_decay:
                undecayed.append(parameter)
            else:
                decayed.append(parameter)
    trainable = sum(parameter.requires_grad for parameter in model.parameters())
    assert len(decayed) + len(undecayed) == trainable, "a parameter is shared or missing"

    groups = [
        dict(params=decayed, weight_decay=cfg.weight_decay),
        dict(params=undecayed, weight_decay=0.0),
    ]
    return [group for group in groups if group["params"]]
