"""Resize a model to another image size or another patch size.

FLIP continues to train its L/16 as L/14 in this way (section 4.2, footnote 3). Learned positions
are interpolated bicubically to the new grid, as the tower itself does in a forward pass; sin-cos
positions are computed again. FLIP does not describe how the patch embedding is resized. Here it is
multiplied by the pseudo-inverse of the resizing matrix (FlexiViT, arXiv 2212.08013, section 3.4):
for larger patches, the new embedding of a resized patch equals the old embedding of the patch; for
smaller patches, it is the least-squares approximation.
"""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from glimpse.model.lazy_tensors import LazyTensors
from glimpse.model.portable import PortableModel
from glimpse.model.towers import PATCH_SIZES
from glimpse.model.vision import resize_positions


def resize_model(
    model: PortableModel, image_size: int | tuple[int, int] | None = None, patch: int | None = None
) -> PortableModel:
    """Return the model for another image size or patch size, in pixels; None keeps the size."""
    # The architecture. A patch size that SIZES does not offer makes the size a custom one.
    old = model.cfg
    patch = old.patch_size if patch is None else patch
    image_size = old.image_size if image_size is None else image_size
    name, custom = old.size.partition("/")[0], old.custom
    if patch != old.patch_size and patch not in PATCH_SIZES and not custom:
        name, custom = "custom", old.shape
    cfg = replace(old, size=f"{name}/{patch}", custom=custom, image_size=image_size)

    # The tensors that change.
    changed = {}
    if cfg.patch_size != old.patch_size:
        changed["vision.patch.weight"] = partial(
            resize_patch_embedding, old=old.patch_size, new=cfg.patch_size
        )
    if cfg.grid != old.grid and cfg.vision.positions == "learned":
        changed["vision.positions"] = partial(resize_position_table, old=old.grid, new=cfg.grid)

    def change(name: str, tensor: Tensor) -> Tensor:
        return changed[name](tensor.float()) if name in changed else tensor

    def get(name: str) -> Tensor:
        return change(name, model.tensors[name])

    meta = {name: change(name, tensor) for name, tensor in model.tensors.meta.items()}
    return replace(model, cfg=cfg, tensors=LazyTensors(meta, get))


def resize_position_table(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Interpolate positions (1 + L, D) to another grid. The class token's row is unchanged."""
    return torch.cat([table[:1], resize_positions(table[1:], old, new)])


def resize_patch_embedding(weight: Tensor, old: int, new: int) -> Tensor:
    """Convert the patch embedding (D, 3 P P) to another patch size, both in pixels."""
    if weight.is_meta:
        return weight.new_empty(len(weight), 3 * new * new)
    basis = torch.eye(old * old, dtype=torch.float64).view(-1, 1, old, old)
    # (old^2, new^2): a flat patch times this matrix is the resized patch
    resize = F.interpolate(basis, (new, new), mode="bicubic", antialias=True).flatten(1)
    inverse = torch.linalg.pinv(resize)  # (new^2, old^2)
    channels = weight.double().unflatten(1, (3, old * old))
    return (channels @ inverse.t()).flatten(1).float()
