"""A model for images of another size, or for patches of another side: FLIP's L/14 is its L/16 tuned
on (section 4.2, footnote 3).

Learned positions are interpolated bicubically to the new grid, as the tower itself does for one
forward pass; sin-cos ones are computed anew. FLIP does not say what becomes of the patch embedding;
here it is resized by the pseudo-inverse of resizing (FlexiViT, arXiv 2212.08013, section 3.4):
where patches grow, the new embedding of a resized patch is the old one's of the patch; where they
shrink, it
is as near as can be.
"""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from glimpse.model.lazy_tensors import Tensors
from glimpse.model.portable import Portable
from glimpse.model.towers import PATCHES
from glimpse.model.vision import resized as resized_grid


def resized(
    model: Portable, image_size: int | tuple[int, int] | None = None, patch: int | None = None
) -> Portable:
    """The same towers for other images or patches, in pixels; what is None stays."""
    old = model.cfg
    name, custom = old.size.partition("/")[0], old.custom
    if patch not in (None, *PATCHES) and not custom:
        name, custom = "custom", old.shape
    cfg = replace(
        old,
        size=f"{name}/{old.patch if patch is None else patch}",
        custom=custom,
        image_size=old.image_size if image_size is None else image_size,
    )
    changed = {}
    if cfg.patch != old.patch:
        changed["vision.patch.weight"] = lambda weight: kernel(weight, old.patch, cfg.patch)
    if cfg.grid != old.grid and cfg.vision.positions == "learned":
        changed["vision.positions"] = lambda table: torch.cat(
            [table[:1], resized_grid(table[1:], old.grid, cfg.grid)]
        )
    meta = {
        name: changed[name](tensor.float()) if name in changed else tensor
        for name, tensor in model.tensors.meta.items()
    }

    def get(name: str) -> Tensor:
        tensor = model.tensors[name]
        return changed[name](tensor.float()) if name in changed else tensor

    return replace(model, cfg=cfg, tensors=Tensors(meta, get))


def kernel(weight: Tensor, old: int, new: int) -> Tensor:
    """A linear layer over patches (D, 3 P P) for patches of another side."""
    if weight.is_meta:
        return weight.new_empty(len(weight), 3 * new * new)
    basis = torch.eye(old * old, dtype=torch.float64).view(-1, 1, old, old)
    # (old^2, new^2): a patch times it is resized
    resize = F.interpolate(basis, (new, new), mode="bicubic", antialias=True).flatten(1)
    inverse = torch.linalg.pinv(resize)  # (new^2, old^2)
    made = weight.double().unflatten(1, (3, old * old)) @ inverse.t()
    return made.flatten(1).float()
