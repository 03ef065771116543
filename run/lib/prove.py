"""A conversion proves itself: what was written is read again bit for bit, and the foreign library's own model, run beside ours, agrees."""
from collections.abc import Callable

import psutil
import torch
from torch import Tensor

from data.patches import patchify
from data.tokenizer import Tokenizer, pack
from model.convert.portable import Portable
from model.convert.rules import Tensors
from model.losses import unit

CLOSE = 1e-5  # of unit embeddings in fp32: what orders of summation leave
CAPTIONS = ("a red circle", "A photo of two cats, asleep on a sofa.", "x", "Schnee über Zürich at 5 pm " * 20)


def same_tensors(one: Tensors, other: Tensors, dtype: torch.dtype) -> str | None:
    """The first name under which two models differ, the first being stored as `dtype`; None if they are the same, bit for bit."""
    for name in sorted(one.meta.keys() | other.meta.keys()):
        if name not in one or name not in other or not torch.equal(one[name].to(dtype), other[name].to(dtype)):
            return name
    return None


def fits(model: Portable) -> bool:
    """Is there memory for two of it in fp32, and a third in between?"""
    return 12 * sum(meta.numel() for meta in model.tensors.meta.values()) < psutil.virtual_memory().available


@torch.no_grad()
def differences(model: Portable, peer: Callable, tokenizer: Tokenizer | None) -> dict[str, float]:
    """{what: the largest difference} between our embeddings of a few images and captions and those of a foreign model, as unit vectors."""
    torch.manual_seed(0)
    images, rows = torch.randn(4, 3, *model.cfg.sides), [tokenizer(caption) for caption in CAPTIONS] if tokenizer else []
    pads = tokenizer.pad_id if tokenizer else 0
    full = [row + [pads] * (model.context - len(row)) for row in rows]
    theirs = peer(images, torch.tensor(full) if rows else None)
    mine = embeddings(model, images, full if model.about.pad_text else rows)
    return {what: float((unit(a) - unit(b)).abs().max()) for what, a, b in zip(("images", "captions"), mine, theirs) if a is not None}


def embeddings(model: Portable, images: Tensor, rows: list[list[int]]) -> tuple[Tensor, Tensor | None]:
    """Unit embeddings of images (B, 3, H, W), normalised, and of rows of ids; of a vision tower alone, its pooled tokens and None."""
    towers, patches = model.towers(), patchify(images, model.cfg.patch)
    positions = torch.arange(patches.shape[1]).expand(len(patches), -1)
    if not model.vocab:
        return towers.image_features(patches, positions), None
    ids, lengths = pack(rows)
    return towers.encode_image(patches, positions), towers.encode_text(ids, lengths)
