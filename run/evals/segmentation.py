"""Segmentation without annotation (MaskCLIP section 4, table 8).

Each patch is of the class whose prompts' mean embedding lies nearest. Class embeddings are a 1x1
classifier on patch tokens under a sliding window; overlapping windows are averaged, and the
similarities resized to the label map, bilinearly. The scores come from a confusion matrix of pixel
counts, so sums over ranks are exact.
Names: C classes, (rows, columns) a window's grid of patches, (H, W) an image's label map.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from glimpse.data.evals.clip_benchmark import IGNORE, Images
from glimpse.data.evals.sliding_windows import WindowGrid, WindowImages
from glimpse.data.transforms import decode
from glimpse.run.evals.embed import BATCH, Embedder
from glimpse.run.evals.segmentation_pictures import draw_segmentations
from glimpse.run.evals.zero_shot import class_embeddings
from glimpse.run.lib.distributed import (
    all_gather_list,
    all_reduce_min,
    all_reduce_sum,
    device,
    rank,
    world_size,
)

FEATURES = ("auto", "tokens", "values")
ANNOTATION = "label_map"


@dataclass(frozen=True)
class Options:
    # 7, 80, 85 (data/evals/prompts.py; MaskCLIP: 85) or a file; default: the set's own
    templates: str = ""
    # pixels that an image's short side is resized to; 0: twice the tower's side (MaskCLIP: 512,
    # Pascal Context 480, at 224)
    size: int = 0
    stride: int = 0  # pixels from window to window; 0: half the tower's side
    # tokens: the tower's; values: of a last block that mixes no tokens; auto: values if the tower
    # pools cls
    features: str = "auto"
    save_picture: int = 8  # number of images drawn in RUN/pictures, with truth and prediction

    def __post_init__(self):
        if self.features not in FEATURES:
            raise ValueError(f"features: {self.features!r}; known: {', '.join(FEATURES)}")
        if min(self.size, self.stride, self.picture) < 0:
            raise ValueError(
                f"size {self.size}, stride {self.stride}, picture {self.picture}: 0 or more"
            )


def check_set(images: Images, options: Options) -> None:
    read_label_map(images, 0, len(images.prompts(options.templates)))


def read_label_map(images: Images, i: int, classes: int) -> Tensor:
    """Return the label map of image i, (H, W) int64.

    ValueError: it has a class that the set does not name.
    """
    truth = torch.from_numpy(images.label_map(i)).long()
    known = truth[truth != IGNORE]
    highest = int(known.max()) if len(known) else 0
    if highest >= classes:
        raise ValueError(
            f"evals: {images.folder}: the label map of {images.key(i)} has class {highest}; only"
            f" {classes} are named"
        )
    return truth


def check_model(model: Embedder, options: Options) -> None:
    if not model.sees_all_patches:
        raise ValueError(
            "--mask, --ensemble: segmentation asks every patch of one view; leave them out"
        )
    height, width = model.cfg.model.sides
    if height != width:
        raise ValueError(
            "evals: segmentation lays square windows on an image, and model.image_size is"
            f" {[height, width]}; leave it out"
        )
    if 0 < options.size < height:
        raise ValueError(
            f"evals: segmentation(size={options.size}): the tower sees windows of {height} pixels;"
            " at least that"
        )


@torch.no_grad()
def evaluate(model: Embedder, images: Images, options: Options) -> dict[str, float]:
    """Return mean_iou and mean_accuracy over the classes that occur, and accuracy over pixels.

    All are shares.
    """
    side = model.cfg.model.sides[0]
    size = options.size or 2 * side
    stride = min(options.stride or side // 2, side)  # no pixel between windows is left out
    sliding = WindowGrid(side, size, stride)
    what = options.features
    if what == "auto":
        what = "values" if model.towers.vision.cfg.pool == "cls" else "tokens"
    classes = class_embeddings(model, images, options.templates)  # (C, E)

    counts = torch.zeros(len(classes), len(classes), dtype=torch.int64, device=device())
    samples = []  # for the picture: number, image, label map and prediction
    for i, similar in image_similarities(model, images, sliding, what, classes):
        truth = read_label_map(images, i, len(classes))
        prediction = resize_maps(similar, truth.shape).argmax(0)
        counts += confusion_matrix(truth.to(prediction.device), prediction, len(classes))
        if i < options.picture:
            pixels = decode(images.image(i))
            samples.append((i, pixels, truth.numpy(), prediction.cpu().numpy()))
    save_picture(model, images, f"{what}-{size}", samples)
    return compute_scores(all_reduce_sum(counts))


def image_similarities(
    model: Embedder, images: Images, sliding: WindowGrid, what: str, classes: Tensor
) -> Iterator[tuple[int, Tensor]]:
    """Yield this rank's images one by one, all ranks in step: (number, cosines).

    The cosines to each class are (C, canvas rows, canvas columns), a pixel of the canvas each.
    """
    share = range(rank(), len(images), world_size())
    # A rank without images goes through the tower in step.
    windows = WindowImages(images, sliding, share or [0])
    every_window = range(len(windows)) if share else []
    turns = -all_reduce_min(
        -math.ceil(len(every_window) / BATCH)
    )  # of the rank with the most windows

    waiting: list[Tensor] = []  # windows of the current image
    for indices, tokens in model.iterate_features(windows, what, every_window, turns):
        if not len(indices):
            continue
        # Patch tokens (m, 1 + rows * columns, D) -> cosines (m, rows * columns, C).
        embedded = model.towers.embed_image(tokens[:, 1:].flatten(0, 1))
        embedded = embedded.unflatten(0, (len(tokens), -1))
        cosines = embedded @ classes.T.to(embedded.device)

        for index, row in zip(indices.tolist(), cosines):
            waiting.append(row.T.unflatten(1, model.grid))
            owner = windows.image_index[index]
            is_last = index + 1 == len(every_window) or windows.image_index[index + 1] != owner
            if is_last:
                yield owner, merge_windows(waiting, sliding, windows.shapes[owner])
                waiting = []


def merge_windows(parts: list[Tensor], sliding: WindowGrid, shape: tuple[int, int]) -> Tensor:
    """Join an image's windows on its canvas, with their mean where they overlap.

    parts: (C, rows, columns) of each window. Return (C, canvas rows, canvas columns).
    """
    rows, columns = sliding.canvas(*shape)
    sums = parts[0].new_zeros(len(parts[0]), rows, columns)
    seen = parts[0].new_zeros(rows, columns)  # windows over each pixel
    for part, (top, left) in zip(parts, sliding.corners(*shape), strict=True):
        here = slice(top, top + sliding.side), slice(left, left + sliding.side)
        sums[:, *here] += resize_maps(part, (sliding.side, sliding.side))
        seen[here] += 1
    return sums / seen


def resize_maps(similar: Tensor, shape: tuple[int, int]) -> Tensor:
    """Resize (C, h, w) to (C, *shape), bilinearly."""
    return F.interpolate(similar[None], tuple(shape), mode="bilinear", align_corners=False)[0]


def confusion_matrix(truth: Tensor, prediction: Tensor, classes: int) -> Tensor:
    """Count the pixels of each class (row) that are predicted as each class (column), (C, C) int64.

    Pixels of no class are left out.
    """
    known = truth != IGNORE
    pairs = truth[known] * classes + prediction[known]
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


def compute_scores(counts: Tensor) -> dict[str, float]:
    """Compute the scores from a confusion matrix (C, C).

    A class that neither occurs nor is predicted does not count, as in mmsegmentation.
    """
    counts = counts.double()
    right = counts.diag()
    pixels = counts.sum(1)  # of each class
    predicted = counts.sum(0)
    union = pixels + predicted - right
    return dict(
        mean_iou=float((right / union)[union > 0].mean()),
        mean_accuracy=float((right / pixels)[pixels > 0].mean()),
        accuracy=float(right.sum() / counts.sum()),
        chance=1 / len(counts),
    )


def save_picture(model: Embedder, images: Images, how: str, samples: list) -> None:
    """Write the images of all ranks to RUN/pictures/TAG-SET-HOW.png.

    samples: (number, image, label map, prediction) of each.
    """
    samples = sorted(all_gather_list(samples), key=lambda row: row[0])
    if rank() or not samples:
        return
    path = model.results_folder / "pictures" / f"{model.tag}-{images.name}-{how}.png"
    path.parent.mkdir(exist_ok=True)
    draw_segmentations([row[1:] for row in samples], images.class_names()).save(path)
    model.log(f"{path}: images, their label maps, what was found")
