"""How a tower draws its weights: a recipe for each kind of parameter.

Weights are drawn inside the layer's own __init__ (Linear and Embedding in model/layers.py): sharded
construction (ZeRO-3's zero.Init) partitions a module's parameters as soon as its __init__ ends, so
that no parent can draw them again.

Letters: D width. To add a recipe: one more function that returns an `Init`.
"""

from dataclasses import dataclass

# 'xavier': U(+-sqrt(6 / (in + out))); 'uniform': torch's default, U(+-in ** -0.5); a number: normal
# of that std
InitSpec = str | float


@dataclass(frozen=True)
class WeightInit:
    """How one tower draws its weights.  The defaults are FLIP's, which are MAE's."""

    # on the fused (3 D, D) weight; the bias is zero in every recipe, as is `out`'s
    qkv: InitSpec = "xavier"
    out: InitSpec = "xavier"  # attention's output layer
    up: InitSpec = "xavier"  # MLP, D -> its hidden width
    down: InitSpec = "xavier"  # MLP, back to D
    patch: InitSpec = "xavier"  # patch embedding, its kernel seen as (D, 3 P P)
    projection: InitSpec = "xavier"  # tower -> common embedding
    bias: str = "zeros"  # biases of the MLP and of the patch embedding
    cls: float = 0.02  # std of the class token
    token: float = 0.02  # std of the token embedding
    positions: float = 0.02  # std of learned positions


def vision_init(init: str, width: int) -> WeightInit:
    """The recipe of a vision tower; for 'clip', what open_clip trains with: torch's defaults (fused
    Xavier for qkv) in all linear layers, std D ** -0.5 in the rest.
    """
    if init == "flip":
        return WeightInit()
    std = width**-0.5
    return WeightInit(
        out="uniform",
        up="uniform",
        down="uniform",
        patch="uniform",
        bias="uniform",
        projection=std,
        cls=std,
        positions=std,
    )


def text_init(init: str, width: int, depth: int) -> WeightInit:
    """The recipe of a text tower; for 'clip', the stds of the CLIP paper's, whose MLP biases stay
    at torch's default.
    """
    if init == "flip":
        return WeightInit()
    std = width**-0.5
    residual = (2 * depth) ** -0.5  # keeps the sum of 2 * depth branches at the scale of one
    return WeightInit(
        qkv=std,
        out=std * residual,
        up=(2 * width) ** -0.5,
        down=std * residual,
        bias="uniform",
        projection=std,
        positions=0.01,
    )
