"""Segmentation from class names, without trained labels (MaskCLIP section 4, table 8).

A patch gets the class whose mean prompt embedding has the highest cosine similarity. The image is
resized and covered by windows of the tower's size; similarities are averaged where windows overlap,
and resized bilinearly to the label map. Scores come from a confusion matrix of pixel counts, whose
sum over ranks is exact.

Shapes: C classes, (rows, columns) the patches of a window, (H, W) a label map.
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
from glimpse.run.lib.config import check_choice
from glimpse.run.lib.distributed import (
    all_gather_list,
    all_reduce_min,
    all_reduce_sum,
    device,
    rank,
    world_size,
)

FEATURES = ("auto", "tokens", "values")
CONTENT = "label_map"


@dataclass(frozen=True)
class Options:
    """Options of segmentation."""

    # 7, 80, 85 (data/evals/prompts.py; MaskCLIP uses 85) or a file; "": the set's own
    templates: str = ""
    # Pixels of an image's short side after resizing; 0: twice the tower's side. MaskCLIP uses 512,
    # and 480 for Pascal Context, with a tower of 224.
    size: int = 0
    stride: int = 0  # pixels between windows; 0: half the tower's side
    # tokens: the tower's; values: those of a last block that mixes no tokens; auto: values if the
    # tower pools cls, else tokens
    features: str = "auto"
    picture: int = 8  # number of images drawn in RUN/pictures, with label map and prediction

    def __post_init__(self):
        check_choice("segmentation(features=...)", self.features, FEATURES)
        for name in ("size", "stride", "picture"):
            value = getattr(self, name)
            if value < 0:
                raise ValueError(f"segmentation({name}={value}): it must be 0 or more")


def check_set(images: Images, options: Options) -> None:
    """Raise ValueError unless the set has class names, templates and label maps."""
    read_label_map(images, 0, len(images.prompts(options.templates)))


def read_label_map(images: Images, i: int, classes: int) -> Tensor:
    """Return the label map of image i, (H, W) int64.

    Raises ValueError if it has a class without a name.
    """
    label_map = torch.from_numpy(images.label_map(i)).long()
    labeled = label_map[label_map != IGNORE]
    highest = int(labeled.max()) if len(labeled) else 0
    if highest >= classes:
        raise ValueError(
            f"evals: {images.folder}: the label map of {images.key(i)} has class {highest}; only"
            f" {classes} are named"
        )
    return label_map


def check_model(model: Embedder, options: Options) -> None:
    """Raise ValueError unless the model sees all patches of square windows, of at most `size`."""
    if not model.sees_all_patches:
        raise ValueError(
            "--mask, --ensemble: segmentation needs all patches in one view; remove these options"
        )
    height, width = model.cfg.model.image_shape
    if height != width:
        raise ValueError(
            "evals: segmentation needs square windows, and model.image_size is"
            f" {[height, width]}; remove segmentation from the evaluations"
        )
    if 0 < options.size < height:
        raise ValueError(
            f"evals: segmentation(size={options.size}): the tower sees windows of {height} pixels;"
            " use at least that size"
        )


@torch.no_grad()
def evaluate(model: Embedder, images: Images, options: Options) -> dict[str, float]:
    """Return mean_iou and mean_accuracy over the classes that occur, and accuracy over pixels.

    All are fractions.
    """
    side = model.cfg.model.image_shape[0]
    size = options.size or 2 * side
    stride = min(options.stride or side // 2, side)  # windows must not leave gaps
    window_grid = WindowGrid(side, size, stride)
    kind = options.features
    if kind == "auto":
        kind = "values" if model.towers.vision.cfg.pool == "cls" else "tokens"
    classes = class_embeddings(model, images, options.templates)  # (C, E)

    counts = torch.zeros(len(classes), len(classes), dtype=torch.int64, device=device())
    picture_rows = []
    for i, similarities in image_similarities(model, images, window_grid, kind, classes):
        label_map = read_label_map(images, i, len(classes))
        prediction = resize_maps(similarities, label_map.shape).argmax(0)
        counts += confusion_matrix(label_map.to(prediction.device), prediction, len(classes))
        if i < options.picture:
            pixels = decode(images.image(i))
            picture_rows.append((i, pixels, label_map.numpy(), prediction.cpu().numpy()))
    save_picture(model, images, f"{kind}-{size}", picture_rows)
    return compute_scores(all_reduce_sum(counts))


def image_similarities(
    model: Embedder, images: Images, window_grid: WindowGrid, kind: str, classes: Tensor
) -> Iterator[tuple[int, Tensor]]:
    """Yield (index, similarities) of each of this rank's images. All ranks must call.

    Similarities are cosines of each class and canvas pixel, (C, canvas rows, canvas columns).
    kind: see Embedder.iterate_features. classes: (C, E).
    """
    # 1. The windows of this rank's images. Under ZeRO-3 all ranks must run the tower equally often,
    #    so all take as many rounds as the rank with the most windows.
    share = range(rank(), len(images), world_size())
    windows = WindowImages(images, window_grid, share or [0])  # a rank without images reads image 0
    window_indices = range(len(windows)) if share else []
    rank_rounds = math.ceil(len(window_indices) / BATCH)
    rounds = -all_reduce_min(-rank_rounds)

    # 2. Collect the similarities of windows until an image is complete.
    image_windows: list[Tensor] = []
    for indices, tokens in model.iterate_features(windows, kind, window_indices, rounds):
        if not len(indices):
            continue
        # Patch tokens (m, 1 + rows * columns, D) -> cosines (m, rows * columns, C).
        embedded = model.towers.embed_image(tokens[:, 1:].flatten(0, 1))
        embedded = embedded.unflatten(0, (len(tokens), -1))
        cosines = embedded @ classes.T.to(embedded.device)

        for index, window_cosines in zip(indices.tolist(), cosines):
            image_windows.append(window_cosines.T.unflatten(1, model.grid))
            image = windows.image_index[index]
            is_last = index + 1 == len(windows) or windows.image_index[index + 1] != image
            if is_last:
                yield image, merge_windows(image_windows, window_grid, windows.shapes[image])
                image_windows = []


def merge_windows(windows: list[Tensor], window_grid: WindowGrid, shape: tuple[int, int]) -> Tensor:
    """Average the similarities of an image's windows at each pixel of its canvas.

    windows: (C, rows, columns) each. shape: (H, W) of the image. Returns (C, canvas rows, canvas
    columns).
    """
    rows, columns = window_grid.canvas(*shape)
    sums = windows[0].new_zeros(len(windows[0]), rows, columns)
    window_counts = windows[0].new_zeros(rows, columns)
    for window, (top, left) in zip(windows, window_grid.corners(*shape), strict=True):
        area = slice(top, top + window_grid.side), slice(left, left + window_grid.side)
        sums[:, *area] += resize_maps(window, (window_grid.side, window_grid.side))
        window_counts[area] += 1
    return sums / window_counts


def resize_maps(maps: Tensor, shape: tuple[int, int]) -> Tensor:
    """Resize (C, h, w) to (C, *shape), bilinearly."""
    return F.interpolate(maps[None], tuple(shape), mode="bilinear", align_corners=False)[0]


def confusion_matrix(label_map: Tensor, prediction: Tensor, classes: int) -> Tensor:
    """Count the pixels of each class (row) by predicted class (column), (C, C) int64.

    Pixels without a class are left out.
    """
    labeled = label_map != IGNORE
    pairs = label_map[labeled] * classes + prediction[labeled]
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


def compute_scores(counts: Tensor) -> dict[str, float]:
    """Return the scores of a confusion matrix (C, C).

    A class that neither occurs nor is predicted does not count, as in mmsegmentation.
    """
    counts = counts.double()
    hits = counts.diag()
    pixels = counts.sum(1)  # of each class
    predicted = counts.sum(0)
    union = pixels + predicted - hits
    return dict(
        mean_iou=float((hits / union)[union > 0].mean()),
        mean_accuracy=float((hits / pixels)[pixels > 0].mean()),
        accuracy=float(hits.sum() / counts.sum()),
        chance=1 / len(counts),
    )


def save_picture(model: Embedder, images: Images, settings: str, rows: list) -> None:
    """Write the rows of all ranks as one picture, RUN/pictures/TAG-SET-SETTINGS.png.

    rows: (index, image, label map, prediction) of each image.
    """
    rows = sorted(all_gather_list(rows), key=lambda row: row[0])
    if rank() or not rows:
        return
    path = model.results_folder / "pictures" / f"{model.tag}-{images.name}-{settings}.png"
    path.parent.mkdir(exist_ok=True)
    draw_segmentations([row[1:] for row in rows], images.class_names()).save(path)
    model.log(f"{path}: images, label maps and predictions")
