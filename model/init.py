"""Weight initialization of the towers: the distribution of each kind of parameter.

A layer initializes its weights in its own __init__ (Linear and Embedding in model/layers.py).
ZeRO-3's zero.Init partitions the parameters of a module as soon as its __init__ ends, so a parent
module cannot initialize them again.

Letters: D width. To add an initialization, add it to vision_init, text_init and towers.INITS.
"""

from dataclasses import dataclass

# 'xavier': U(+-sqrt(6 / (in + out))); 'uniform': PyTorch's default, U(+-in ** -0.5); a float:
# normal with this standard deviation.
InitSpec = str | float


@dataclass(frozen=True)
class WeightInit:
    """Initialization of one tower. The defaults are FLIP's, which are MAE's.

    The biases of `qkv` and `out` are always zero.
    """

    # the fused (3 D, D) weight of queries, keys and values
    qkv: InitSpec = "xavier"
    out: InitSpec = "xavier"  # output layer of the attention
    up: InitSpec = "xavier"  # first layer of the MLP
    down: InitSpec = "xavier"  # second layer of the MLP
    patch: InitSpec = "xavier"  # patch embedding, with its kernel seen as (D, 3 P P)
    projection: InitSpec = "xavier"  # from a tower to the shared embedding
    bias: str = "zeros"  # biases of the MLP and of the patch embedding
    cls: float = 0.02  # std of the class token
    token: float = 0.02  # std of the token embedding
    positions: float = 0.02  # std of learned position embeddings


def vision_init(init: str, width: int) -> WeightInit:
    """Return the initialization of a vision tower; init: 'flip' or 'clip'.

    'clip' is open_clip's: PyTorch's defaults for linear layers and multi-head attention (Xavier for
    the fused qkv), and std D ** -0.5 for the other parameters.
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
    """Return the initialization of a text tower; init: 'flip' or 'clip'.

    'clip' has the standard deviations of OpenAI's code, in which the MLP biases keep PyTorch's
    default.
    """
    if init == "flip":
        return WeightInit()
    std = width**-0.5
    # The sum of 2 * depth residual branches then has the scale of one branch.
    residual = (2 * depth) ** -0.5
    return WeightInit(
        qkv=std,
        out=std * residual,
        up=(2 * width) ** -0.5,
        down=std * residual,
        bias="uniform",
        projection=std,
        positions=0.01,
    )
