"""A conversion proves itself: what was written is read again bit for bit, and the foreign library's
own model, run beside ours, agrees.
"""

from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from torch import Tensor

from glimpse.data.patches import patchify
from glimpse.data.tokenizer import Tokenizer, pack
from glimpse.model.lazy_tensors import Tensors
from glimpse.model.losses import unit
from glimpse.model.portable import Portable

CLOSE = 1e-5  # of unit embeddings in fp32: what orders of summation leave
CAPTIONS = (
    "a red circle",
    "A photo of two cats, asleep on a sofa.",
    "x",
    "Schnee über Zürich at 5 pm " * 20,
)


def flaw(one: Tensors, other: Tensors, dtype: torch.dtype) -> str | None:
    """What is wrong with the second model, which was written of the first with `dtype`; None if it
    is the same, bit for bit.
    """
    for name in sorted(one.meta.keys() | other.meta.keys()):
        if name not in one or name not in other:
            return f"{name} is not in {'what was written' if name in one else 'the source'}"
        value = one[name].to(dtype)
        if not value.isfinite().all():
            return (
                f"{name} holds values that are no numbers, or too large for"
                f" {str(dtype).removeprefix('torch.')}"
            )
        if not torch.equal(value, other[name].to(dtype)):
            return f"{name} is another when it is read again"
    return None


def rounded(tensors: Tensors, dtype: torch.dtype) -> bool:
    """Does `dtype` hold less than these are stored in?"""
    return any(torch.promote_types(meta.dtype, dtype) != dtype for meta in tensors.meta.values())


def fits(model: Portable) -> bool:
    """Is there memory for two of it in fp32, and a third in between?"""
    return 12 * sum(meta.numel() for meta in model.tensors.meta.values()) < room()


def room(groups: Path = Path("/proc/self/cgroup"), under: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of memory that this process may still take: the machine's, or less where a job or
    container has a limit (cgroup v2).
    """
    free = psutil.virtual_memory().available
    try:
        own = next(
            line.partition("::/")[2]
            for line in groups.read_text().splitlines()
            if line.startswith("0::/")
        )
        for group in (
            under / own,
            *(parent for parent in (under / own).parents if under in (parent, *parent.parents)),
        ):
            if (limit := group / "memory.max").exists() and (
                most := limit.read_text().strip()
            ) != "max":
                # caches make room
                used = dict(
                    line.split() for line in (group / "memory.stat").read_text().splitlines()
                )["anon"]
                free = min(free, int(most) - int(used))
    except (OSError, StopIteration, ValueError, KeyError):  # no such groups here
        pass
    return free


@torch.no_grad()
def differences(model: Portable, peer: Callable, tokenizer: Tokenizer | None) -> dict[str, float]:
    """{what: the largest difference} between our embeddings of a few images and captions and those
    of a foreign model, as unit vectors.
    """
    torch.manual_seed(0)
    images, rows = (
        torch.randn(4, 3, *model.cfg.sides),
        [tokenizer(caption) for caption in CAPTIONS] if tokenizer else [],
    )
    pads = tokenizer.pad_id if tokenizer else 0
    full = [row + [pads] * (model.context - len(row)) for row in rows]
    theirs = peer(images, torch.tensor(full) if rows else None)
    mine = embeddings(model, images, full if model.about.pad_text else rows)
    return {
        what: float((unit(a) - unit(b)).abs().max())
        for what, a, b in zip(("images", "captions"), mine, theirs)
        if a is not None
    }


def embeddings(
    model: Portable, images: Tensor, rows: list[list[int]]
) -> tuple[Tensor, Tensor | None]:
    """Unit embeddings of images (B, 3, H, W), normalised, and of rows of ids; of a vision tower
    alone, its pooled tokens and None.
    """
    towers, patches = model.towers(), patchify(images, model.cfg.patch)
    positions = torch.arange(patches.shape[1]).expand(len(patches), -1)
    if not model.vocab:
        return towers.image_features(patches, positions), None
    ids, lengths = pack(rows)
    return towers.encode_image(patches, positions), towers.encode_text(ids, lengths)
