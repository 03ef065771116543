"""Losses of the methods.

The contrastive loss of B pairs (InfoNCE; CLIP, arXiv 2103.00020), as one would write it for one
process:

    logits = scale * image @ text.t()
    labels = torch.arange(B)
    loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), labels)) / 2

`contrastive` is this loss over the pairs of all ranks, without the B x B matrix
(model/tiled_softmax.py); `simclr` likewise. The other losses return a number per sample, (b,).

Letters: `b` samples on this rank, `B` = b x ranks, `E` embedding width, `M` tokens.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from glimpse.model.collectives import check_equal_batches
from glimpse.model.tiled_softmax import TiledContrastive, TiledSimCLR


def l2_normalize(x: Tensor) -> Tensor:
    """Return vectors (..., E) scaled to length 1, in fp32 (fp64 stays fp64)."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)


# ---- over all ranks


def contrastive(
    image: Tensor, text: Tensor, scale: Tensor, exact: bool = True
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the contrastive loss () and {"accuracy": ()}, the same numbers on every rank.

    image and text are (b, E), scale is (1,).

    The loss is the mean over the B pairs and both directions, in fp32 (fp64 stays fp64). Its
    gradients are those of the global mean loss times the number of ranks: DeepSpeed averages
    parameter gradients over ranks, and so applies the exact gradient. (A full matrix on every rank
    with the own slice re-inserted would apply exact / ranks; local rows against detached columns
    only the query-side half.)

    exact False: the same loss with the gradients of SLIP's release, whose local rows meet gathered
    columns that carry none.

    Accuracy: the share of pairs whose logit beats every other of its row, averaged with that of its
    column; a tie is a miss.
    """
    if image.ndim != 2 or image.shape != text.shape or not len(image):
        raise ValueError(
            f"image {tuple(image.shape)} and text {tuple(text.shape)}: both must be (b, E), b > 0,"
            " one row a pair"
        )
    if scale.shape != (1,):
        raise ValueError(f"scale has shape {tuple(scale.shape)}, must be (1,)")
    check_equal_batches(image)
    kind = torch.promote_types(image.dtype, torch.float32)
    loss, accuracy = TiledContrastive.apply(image.to(kind), text.to(kind), scale.to(kind), exact)
    return loss, {"accuracy": accuracy}


def dense_contrastive(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """Return the loss as defined above, for one process: (B, E), (B, E), (1,) -> ().

    Tests and benchmarks compare with it.
    """
    logits = scale * image @ text.t()
    labels = torch.arange(len(image), device=image.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), labels)) / 2


def simclr(
    first: Tensor, second: Tensor, temperature: float = 0.1
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return SimCLR's loss () and {"simclr_accuracy": ()}, the same numbers on every rank.

    one and two: the vectors of two views, each (b, E).

    The loss is NT-Xent (arXiv 2002.05709, equation 1) over the views of all ranks: each view's
    positive is the other view of its image, its negatives both views of all other images. Mean over
    the 2 B rows; gradients as `contrastive`'s.
    """
    if first.ndim != 2 or first.shape != second.shape or not len(first):
        raise ValueError(
            f"one {tuple(first.shape)} and two {tuple(second.shape)}: both must be (b, E), b > 0, one"
            " row an image"
        )
    check_equal_batches(first)
    loss, accuracy = TiledSimCLR.apply(l2_normalize(first), l2_normalize(second), 1 / temperature)
    return loss, {"simclr_accuracy": accuracy}


# ---- a number per sample


def byol(prediction: Tensor, target: Tensor) -> Tensor:
    """Return 2 - 2 cos, (b, E) x 2 -> (b,) (BYOL, arXiv 2006.07733, equation 2).

    No gradient reaches the target.
    """
    return 2 - 2 * (l2_normalize(prediction) * l2_normalize(target.detach())).sum(-1)


def simsiam(prediction: Tensor, target: Tensor) -> Tensor:
    """Return -cos, (b, E) x 2 -> (b,) (SimSiam, arXiv 2011.10566, equation 1).

    No gradient reaches the target.
    """
    return -(l2_normalize(prediction) * l2_normalize(target.detach())).sum(-1)


def distillation(
    prediction: Tensor, target: Tensor, beta: float = 2.0, normalise: bool = False
) -> Tensor:
    """Return the smooth L1 loss, (b, M, D) x 2 -> (b,) (MaskCLIP section 3.2).

    It is the mean over tokens and channels. normalise: layer-normalize the targets.
    """
    prediction, target = prediction.float(), target.detach().float()
    if normalise:
        target = F.layer_norm(target, target.shape[-1:])
    return F.smooth_l1_loss(prediction, target, beta=beta, reduction="none").mean((1, 2))


def reconstruction(prediction: Tensor, target: Tensor, normalise: bool = True) -> Tensor:
    """Return the mean squared error of patches, (b, M, X) x 2 -> (b,) (MAE section 3).

    normalise: normalize each target patch by its own mean and standard deviation.
    """
    prediction, target = prediction.float(), target.detach().float()
    if normalise:
        mean = target.mean(-1, keepdim=True)
        variance = target.var(-1, keepdim=True)
        target = (target - mean) / (variance + 1e-6).sqrt()
    return (prediction - target).square().mean((1, 2))
