"""Segmentation without annotation: each patch is of the class whose prompts' mean embedding lies
nearest (MaskCLIP section 4, table 8).

Class embeddings are a 1x1 classifier on patch tokens under a sliding window; overlapping windows
are averaged, and the similarities brought to the label map's own size, bilinearly. What is counted
is a confusion matrix, so sums over ranks are exact.
Names: C classes, (rows, columns) a window's grid of patches, (H, W) an image's label map.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from glimpse.data.evals.clip_benchmark import IGNORE, Images
from glimpse.data.evals.sliding_windows import Sliding, Windows
from glimpse.data.transforms import decode
from glimpse.run.evals.embed import BATCH, Embedder
from glimpse.run.evals.segmentation_pictures import segmentations
from glimpse.run.evals.zero_shot import class_embeddings
from glimpse.run.lib.distributed import device, gathered, least, rank, total, world

FEATURES = ("auto", "tokens", "values")
READS = "label_map"


@dataclass(frozen=True)
class Options:
    # 7, 80, 85 (data/evals/prompts.py; MaskCLIP: 85) or a file; default: the set's own
    templates: str = ""
    # pixels that an image's short side is brought to; 0: twice the tower's side (MaskCLIP: 512,
    # Pascal Context 480, at 224)
    size: int = 0
    stride: int = 0  # pixels from window to window; 0: half the tower's side
    # tokens: the tower's; values: of a last block that mixes no tokens; auto: values where cls is
    # pooled
    features: str = "auto"
    picture: int = 8  # so many images with truth and prediction go to RUN/pictures

    def __post_init__(self):
        if self.features not in FEATURES:
            raise ValueError(f"features: {self.features!r}; known: {', '.join(FEATURES)}")
        if min(self.size, self.stride, self.picture) < 0:
            raise ValueError(
                f"size {self.size}, stride {self.stride}, picture {self.picture}: 0 or more"
            )


def check(images: Images, options: Options) -> None:
    check_map(images, 0, len(images.prompts(options.templates)))


def check_map(images: Images, i: int, classes: int) -> Tensor:
    """The label map of image i, (H, W) int64.

    ValueError: it has a class that the set does not name.
    """
    found = torch.from_numpy(images.label_map(i)).long()
    highest = int(found[found != IGNORE].max()) if (found != IGNORE).any() else 0
    if highest >= classes:
        raise ValueError(
            f"evals: {images.folder}: the label map of {images.key(i)} has class {highest}; only"
            f" {classes} are named"
        )
    return found


def fits(model: Embedder, options: Options) -> None:
    if not model.whole:
        raise ValueError(
            "--mask, --ensemble: segmentation asks every patch of one view; leave them out"
        )
    side, width = model.cfg.model.sides
    if side != width:
        raise ValueError(
            "evals: segmentation lays square windows on an image, and model.image_size is"
            f" {[side, width]}; leave it out"
        )
    if 0 < options.size < side:
        raise ValueError(
            f"evals: segmentation(size={options.size}): the tower sees windows of {side} pixels; at"
            " least that"
        )


@torch.no_grad()
def evaluate(model: Embedder, images: Images, options: Options) -> dict[str, float]:
    """mean_iou and mean_accuracy over the classes that occur, accuracy over pixels; shares."""
    side = model.cfg.model.sides[0]
    sliding = Sliding(side, options.size or 2 * side, min(options.stride or side // 2, side))
    values = (
        options.features == "values"
        or options.features == "auto"
        and model.towers.vision.cfg.pool == "cls"
    )
    classes = class_embeddings(model, images, options.templates)  # (C, E)
    counts, shown = torch.zeros(len(classes), len(classes), dtype=torch.int64, device=device()), []
    for i, similar in similarities(
        model, images, sliding, "values" if values else "tokens", classes
    ):
        truth = check_map(images, i, len(classes))
        found = resized(similar, truth.shape).argmax(0)
        counts += confusion(truth.to(found.device), found, len(classes))
        if i < options.picture:
            shown.append((i, decode(images.image(i)), truth.numpy(), found.cpu().numpy()))
    picture(model, images, f"{'values' if values else 'tokens'}-{sliding.size}", shown)
    return scores(total(counts))


def similarities(
    model: Embedder, images: Images, sliding: Sliding, what: str, classes: Tensor
) -> Iterator[tuple[int, Tensor]]:
    """This rank's images one by one: (number, cosines (C, rows, columns) of its canvas's patches);
    all ranks in step.
    """
    mine = range(rank(), len(images), world())
    # a rank without images goes through the tower in step
    windows = Windows(images, sliding, mine or [0])
    own = range(len(windows)) if mine else []
    turns = -least(-math.ceil(len(own) / BATCH))
    waiting: list[Tensor] = []
    for indices, tokens in model.passed(windows, what, own, turns):
        if not len(indices):
            continue
        # (m, rows * columns, E)
        embedded = model.towers.embed_image(tokens[:, 1:].flatten(0, 1)).unflatten(
            0, (len(tokens), -1)
        )
        for index, row in zip(indices.tolist(), embedded @ classes.T.to(embedded.device)):
            waiting.append(row.T.unflatten(1, model.grid))
            owner = windows.owner[index]
            if index + 1 == len(own) or windows.owner[index + 1] != owner:
                yield owner, joined(waiting, sliding, windows.shapes[owner])
                waiting = []


def joined(parts: list[Tensor], sliding: Sliding, shape: tuple[int, int]) -> Tensor:
    """The windows' (C, rows, columns) on their canvas of pixels, (C, canvas rows, canvas columns):
    the mean where they overlap.
    """
    rows, columns = sliding.canvas(*shape)
    sums, seen = parts[0].new_zeros(len(parts[0]), rows, columns), parts[0].new_zeros(rows, columns)
    for part, (top, left) in zip(parts, sliding.places(*shape), strict=True):
        here = slice(top, top + sliding.side), slice(left, left + sliding.side)
        sums[:, *here] += resized(part, (sliding.side, sliding.side))
        seen[here] += 1
    return sums / seen


def resized(similar: Tensor, shape: tuple[int, int]) -> Tensor:
    """(C, h, w) -> (C, *shape), bilinear."""
    return F.interpolate(similar[None], tuple(shape), mode="bilinear", align_corners=False)[0]


def confusion(truth: Tensor, found: Tensor, classes: int) -> Tensor:
    """(C, C) int64: pixels of each class, row, that were taken for each class, column; those of no
    class are left out.
    """
    known = truth != IGNORE
    return torch.bincount(truth[known] * classes + found[known], minlength=classes**2).view(
        classes, classes
    )


def scores(counts: Tensor) -> dict[str, float]:
    """From a confusion matrix (C, C); a class that neither occurs nor is found does not count, as
    in mmsegmentation.
    """
    counts = counts.double()
    right, there, said = counts.diag(), counts.sum(1), counts.sum(0)
    union = there + said - right
    return dict(
        mean_iou=float((right / union)[union > 0].mean()),
        mean_accuracy=float((right / there)[there > 0].mean()),
        accuracy=float(right.sum() / counts.sum()),
        chance=1 / len(counts),
    )


def picture(model: Embedder, images: Images, how: str, shown: list) -> None:
    """Write the shown images of all ranks to RUN/pictures/TAG-SET-HOW.png."""
    shown = sorted(gathered(shown), key=lambda row: row[0])
    if rank() or not shown:
        return
    path = model.home / "pictures" / f"{model.tag}-{images.name}-{how}.png"
    path.parent.mkdir(exist_ok=True)
    segmentations([row[1:] for row in shown], images.classes()).save(path)
    model.say(f"{path}: images, their label maps, what was found")
