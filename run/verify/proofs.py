"""Checks of a conversion: the written model has the source's tensors bit for bit, and the reference
library computes the same embeddings as Glimpse.
"""

import math
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from torch import Tensor

from glimpse.data.patches import patchify
from glimpse.data.tokenizer import Tokenizer, pack
from glimpse.model.lazy_tensors import LazyTensors
from glimpse.model.losses import l2_normalize
from glimpse.model.portable import PortableModel

TOLERANCE = 1e-5  # for unit embeddings in fp32; libraries may sum in another order
CAPTIONS = (
    "a red circle",
    "A photo of two cats, asleep on a sofa.",
    "x",
    "Schnee über Zürich at 5 pm " * 20,
)


def find_difference(source: LazyTensors, written: LazyTensors, dtype: torch.dtype) -> str | None:
    """Describe the first tensor that differs between a model and its copy, stored as `dtype`.

    None if all tensors are equal bit for bit.
    """
    for name in sorted(source.meta.keys() | written.meta.keys()):
        if name not in written:
            return f"{name} is missing in the written model"
        if name not in source:
            return f"{name} is not in the source"
        value = source[name].to(dtype)
        if not value.isfinite().all():
            return (
                f"{name} contains nan or infinity, or values too large for"
                f" {str(dtype).removeprefix('torch.')}"
            )
        if not torch.equal(value, written[name].to(dtype)):
            return f"{name} has other values in the written model"
    return None


def loses_precision(tensors: LazyTensors, dtype: torch.dtype) -> bool:
    """Return True if `dtype` cannot represent all values of the tensors' dtypes."""
    return any(torch.promote_types(meta.dtype, dtype) != dtype for meta in tensors.meta.values())


def fits_in_memory(model: PortableModel) -> bool:
    """Return True if memory suffices for two such models in fp32, and temporarily a third."""
    return 12 * sum(meta.numel() for meta in model.tensors.meta.values()) < available_memory()


def available_memory(
    groups: Path = Path("/proc/self/cgroup"), under: Path = Path("/sys/fs/cgroup")
) -> int:
    """Return the bytes of memory that this process can still allocate.

    That is the machine's free memory, or less if a job or container has a limit (cgroup v2).
    groups: the file that names this process's group. under: the root folder of all groups.
    """
    free = psutil.virtual_memory().available
    try:
        lines = groups.read_text().splitlines()
        name = next(line.partition("::/")[2] for line in lines if line.startswith("0::/"))
        group = under / name
        parents = [parent for parent in group.parents if parent.is_relative_to(under)]
        for folder in (group, *parents):
            free = min(free, cgroup_memory(folder))
    except (OSError, StopIteration, ValueError, KeyError):  # no cgroup v2
        pass
    return free


def cgroup_memory(group: Path) -> float:
    """Return the bytes of memory that a cgroup still allows; infinity without a limit."""
    file = group / "memory.max"
    limit = file.read_text().strip() if file.exists() else "max"
    if limit == "max":
        return math.inf
    lines = (group / "memory.stat").read_text().splitlines()
    used = dict(line.split() for line in lines)["anon"]  # caches can be freed
    return int(limit) - int(used)


@torch.no_grad()
def embedding_differences(
    model: PortableModel, reference: Callable, tokenizer: Tokenizer | None
) -> dict[str, float]:
    """Compare the unit embeddings of a few images and captions with those of a reference library.

    reference: as `reference_model` of a format returns it. Return the largest absolute differences,
    {"images": ..., "captions": ...}.
    """
    torch.manual_seed(0)
    images = torch.randn(4, 3, *model.cfg.image_shape)
    rows, padded, ids = [], [], None
    if tokenizer:
        rows = [tokenizer(caption) for caption in CAPTIONS]
        padded = [row + [tokenizer.pad_id] * (model.context - len(row)) for row in rows]
        ids = torch.tensor(padded)
    foreign_embeddings = reference(images, ids)
    embeddings = compute_embeddings(model, images, padded if model.about.pad_text else rows)
    largest = {}
    for kind, vectors, foreign_vectors in zip(
        ("images", "captions"), embeddings, foreign_embeddings
    ):
        if vectors is not None:
            difference = l2_normalize(vectors) - l2_normalize(foreign_vectors)
            largest[kind] = float(difference.abs().max())
    return largest


def compute_embeddings(
    model: PortableModel, images: Tensor, rows: list[list[int]]
) -> tuple[Tensor, Tensor | None]:
    """Return unit embeddings of normalized images (B, 3, H, W) and of captions (rows of ids).

    For a model without a text tower: the pooled image tokens, and None.
    """
    towers = model.towers()
    patches = patchify(images, model.cfg.patch_size)
    positions = torch.arange(patches.shape[1]).expand(len(patches), -1)
    if not model.vocab:
        return towers.image_features(patches, positions), None
    ids, lengths = pack(rows)
    return towers.encode_image(patches, positions), towers.encode_text(ids, lengths)
