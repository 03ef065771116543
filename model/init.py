"""Linear layers and the draw of their weights: the one place where tensor parallelism enters the
towers.

The layers of a block are made here in pairs: `column_linear` widens (qkv, the MLP's first),
`row_linear` comes back. Both are
plain today; a tensor-parallel pair splits the first by outputs and the second by inputs and needs
no change elsewhere.
Weights are drawn inside the layer's own __init__: sharded construction (ZeRO-3's zero.Init)
partitions a module's parameters
as soon as its __init__ ends, so no parent can draw them again.  Letters: D width.
To add a recipe: one more function that returns an `Init`.
"""

from dataclasses import dataclass

from torch import nn

# 'xavier': U(+-sqrt(6 / (in + out))); 'uniform': torch's default, U(+-in ** -0.5); a number: normal
# of that std
Draw = str | float


class Linear(nn.Linear):
    """(..., inputs) -> (..., outputs).

    `bias`: 'zeros', 'uniform' (torch's default) or None for no bias.
    """

    def __init__(self, inputs: int, outputs: int, weight: Draw, bias: str | None = "zeros"):
        self.draw = weight, bias  # before super().__init__, which calls reset_parameters
        super().__init__(inputs, outputs, bias=bias is not None)

    def reset_parameters(self) -> None:
        (weight, bias), bound = self.draw, self.in_features**-0.5
        if weight == "xavier":
            nn.init.xavier_uniform_(self.weight)
        elif weight == "uniform":
            nn.init.uniform_(self.weight, -bound, bound)
        else:
            nn.init.normal_(self.weight, std=weight)
        if bias == "zeros":
            nn.init.zeros_(self.bias)
        elif bias == "uniform":
            nn.init.uniform_(self.bias, -bound, bound)


column_linear = row_linear = Linear


@dataclass(frozen=True)
class Init:
    """How one tower draws its weights.  The defaults are FLIP's, which are MAE's."""

    # on the fused (3 D, D) weight; the bias is zero in every recipe, as is `out`'s
    qkv: Draw = "xavier"
    out: Draw = "xavier"  # attention's output layer
    up: Draw = "xavier"  # MLP, D -> its hidden width
    down: Draw = "xavier"  # MLP, back to D
    patch: Draw = "xavier"  # patch embedding, its kernel seen as (D, 3 P P)
    projection: Draw = "xavier"  # tower -> common embedding
    bias: str = "zeros"  # biases of the MLP and of the patch embedding
    cls: float = 0.02  # std of the class token
    token: float = 0.02  # std of the token embedding
    positions: float = 0.02  # std of learned positions


def vision_init(init: str, width: int) -> Init:
    """For 'clip', what open_clip trains with: torch's defaults (fused Xavier for qkv) in all linear
    layers, std D ** -0.5 in the rest.
    """
    std = width**-0.5
    if init == "flip":
        return Init()
    return Init(
        out="uniform",
        up="uniform",
        down="uniform",
        patch="uniform",
        bias="uniform",
        projection=std,
        cls=std,
        positions=std,
    )


def text_init(init: str, width: int, depth: int) -> Init:
    """For 'clip', the stds of the CLIP paper's text tower; its MLP biases stay at torch's
    default.
    """
    # `residual` keeps the sum of 2 * depth branches at the scale of one
    std, residual = width**-0.5, (2 * depth) ** -0.5
    if init == "flip":
        return Init()
    return Init(
        qkv=std,
        out=std * residual,
        up=(2 * width) ** -0.5,
        down=std * residual,
        bias="uniform",
        projection=std,
        positions=0.01,
    )
