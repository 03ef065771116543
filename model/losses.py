"""Losses of the methods.

The contrastive loss of B pairs (InfoNCE; CLIP, arXiv 2103.00020), for a single process:

    logits = scale * image @ text.t()
    labels = torch.arange(B)
    loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), labels)) / 2

`contrastive` computes this loss over the pairs of all ranks without storing the B x B matrix
(model/tiled_softmax.py), and so does `simclr`. The other losses return one number per sample, (b,).

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


# ---- losses over the samples of all ranks


def contrastive(
    image: Tensor, text: Tensor, scale: Tensor, exact: bool = True
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the contrastive loss () and {"accuracy": ()}, the same values on every rank.

    image and text: (b, E). scale: (1,).

    The loss is the mean over the B pairs and both directions, in fp32 (fp64 stays fp64). Its
    gradient on a rank is the gradient of this global mean times the number of ranks. DeepSpeed
    averages parameter gradients over ranks, so the parameters get the exact gradient. Two
    common shortcuts are wrong: gathering without a gradient and putting the local features back
    gives the gradient divided by the number of ranks; multiplying local rows with detached columns
    gives only the gradient through the rows.

    exact=False: the second of these, as in SLIP's released code; the loss is the same.

    Accuracy: the share of pairs whose logit is greater than all others in its row, averaged with
    the same share for columns. A tie counts as wrong.
    """
    if image.ndim != 2 or image.shape != text.shape or not len(image):
        raise ValueError(
            f"image {tuple(image.shape)}, text {tuple(text.shape)}: both must have the shape (b, E)"
            " with b > 0, one row per pair"
        )
    if scale.shape != (1,):
        raise ValueError(f"scale: has the shape {tuple(scale.shape)}; it must be (1,)")
    check_equal_batches(image)
    dtype = torch.promote_types(image.dtype, torch.float32)
    loss, accuracy = TiledContrastive.apply(image.to(dtype), text.to(dtype), scale.to(dtype), exact)
    return loss, {"accuracy": accuracy}


def dense_contrastive(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """Return the contrastive loss of one process as defined above, (B, E), (B, E), (1,) -> ().

    The reference for tests and benchmarks.
    """
    logits = scale * image @ text.t()
    labels = torch.arange(len(image), device=image.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), labels)) / 2


def simclr(
    first: Tensor, second: Tensor, temperature: float = 0.1
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return SimCLR's loss () and {"simclr_accuracy": ()}, the same values on every rank.

    first and second: vectors of two views of the same images, each (b, E).

    The loss is NT-Xent (arXiv 2002.05709, equation 1) over the views of all ranks, as the mean over
    the 2 B rows. The positive of a view is the other view of its image; its negatives are both
    views of all other images. Gradients are scaled as in `contrastive`.
    """
    if first.ndim != 2 or first.shape != second.shape or not len(first):
        raise ValueError(
            f"first {tuple(first.shape)}, second {tuple(second.shape)}: both must have the shape"
            " (b, E) with b > 0, one row per image"
        )
    check_equal_batches(first)
    loss, accuracy = TiledSimCLR.apply(l2_normalize(first), l2_normalize(second), 1 / temperature)
    return loss, {"simclr_accuracy": accuracy}


# ---- losses per sample


def byol(prediction: Tensor, target: Tensor) -> Tensor:
    """Return 2 - 2 cos(prediction, target), (b, E) x 2 -> (b,) (BYOL, arXiv 2006.07733, eq. 2).

    The target gets no gradient.
    """
    return 2 - 2 * (l2_normalize(prediction) * l2_normalize(target.detach())).sum(-1)


def simsiam(prediction: Tensor, target: Tensor) -> Tensor:
    """Return -cos(prediction, target), (b, E) x 2 -> (b,) (SimSiam, arXiv 2011.10566, eq. 1).

    The target gets no gradient.
    """
    return -(l2_normalize(prediction) * l2_normalize(target.detach())).sum(-1)


def distillation(
    prediction: Tensor, target: Tensor, beta: float = 2.0, normalize: bool = False
) -> Tensor:
    """Return the smooth L1 loss, (b, M, D) x 2 -> (b,) (MaskCLIP section 3.2).

    The mean over tokens and channels. normalize: apply a layer norm without weights to the targets.
    """
    prediction, target = prediction.float(), target.detach().float()
    if normalize:
        target = F.layer_norm(target, target.shape[-1:])
    return F.smooth_l1_loss(prediction, target, beta=beta, reduction="none").mean((1, 2))


def reconstruction(prediction: Tensor, target: Tensor, normalize: bool = True) -> Tensor:
    """Return the mean squared error of patches, (b, M, X) x 2 -> (b,) (MAE section 3).

    normalize: normalize each target patch by the mean and standard deviation of its pixels.
    """
    prediction, target = prediction.float(), target.detach().float()
    if normalize:
        mean = target.mean(-1, keepdim=True)
        variance = target.var(-1, keepdim=True)
        target = (target - mean) / (variance + 1e-6).sqrt()
    return (prediction - target).square().mean((1, 2))
