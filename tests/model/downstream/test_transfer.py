"""The recipe of docs/transfer.md is one script that runs and learns: its blocks are executed
unchanged, on a tiny set.

Run: pytest tests/model/downstream/test_transfer.py -s
On a CPU build of torch, whose torchvision has no compiled operators (tests/conftest.py), plain ones
replace them.
To run the recipe on another set, with its output:
python -m tests.model.downstream.test_transfer "RUN='runs/mine'" STEPS=100
"""

import ast
import io
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from glimpse.data.shards import build_index, write_shard
from glimpse.tests.helpers.tiny import ROOT, environment, launch, tiny_run_arguments, write_dataset


def nms(boxes, scores, threshold):
    """torchvision's nms in numpy."""
    from torchvision.ops import box_iou

    order = scores.argsort(descending=True, stable=True)
    covers = (box_iou(boxes[order], boxes[order]) > threshold).numpy()
    stays = np.ones(len(order), bool)
    for i in range(len(order)):
        if stays[i]:
            stays[i + 1 :] &= ~covers[i, i + 1 :]
    return order[torch.from_numpy(stays)]


def samples(first, length, count):
    """Return the centers (N, count) of equal parts of intervals."""
    return first[:, None] + length[:, None] * (torch.arange(count) + 0.5) / count


def roi_align(maps, boxes, output_size, spatial_scale=1.0, sampling_ratio=-1, aligned=False):
    """torchvision's roi_align for boxes inside the image: the mean of bilinear samples of each bin.

    maps (B, C, H, W), boxes (N, 5): image and box -> (N, C, *output_size).
    """
    rows, columns = output_size
    height, width = maps.shape[2:]
    result = maps.new_zeros(len(boxes), maps.shape[1], rows, columns)
    for image in boxes[:, 0].unique():
        # The boxes of the image, and the samples of a bin in each direction.
        indices = (boxes[:, 0] == image).nonzero()[:, 0]
        left, top, right, bottom = (boxes[indices, 1:] * spatial_scale).unbind(1)
        across = (right - left).clamp(min=1)
        down = (bottom - top).clamp(min=1)
        ratio = sampling_ratio
        if ratio <= 0:
            ratio = math.ceil(max((across / columns).max(), (down / rows).max()))

        # Places from -1 to 1: (N, rows, columns, 2).
        x = 2 * samples(left, across, columns * ratio) / max(1, width - 1) - 1
        y = 2 * samples(top, down, rows * ratio) / max(1, height - 1) - 1
        grid = torch.stack(torch.broadcast_tensors(x[:, None], y[:, :, None]), 3)

        # All boxes below each other in one picture.
        sampled = F.grid_sample(
            maps[int(image)][None],
            grid.flatten(0, 1)[None],
            padding_mode="border",
            align_corners=True,
        )
        bins = F.avg_pool2d(sampled, ratio)[0].unflatten(1, (len(indices), -1)).transpose(0, 1)
        result = result.index_copy(0, indices, bins)
    return result


def plain_operators():
    """Replace torchvision's compiled operators by the two above, if they cannot be loaded."""
    import torchvision

    if not torchvision.extension._has_ops():
        torchvision.ops.boxes.nms = nms
        torchvision.ops.poolers.roi_align = roi_align
        torchvision.models.detection.roi_heads.roi_align = roi_align


def recipe(**changed) -> dict:
    """Execute the blocks of docs/transfer.md in order, with other values for the names in capitals,
    and return all names that they define.
    """
    plain_operators()
    text = (ROOT / "docs/transfer.md").read_text()
    names = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.S):
        exec(compile(block, "docs/transfer.md", "exec"), names)
        names.update({key: value for key, value in changed.items() if key in names})
    return names


def scenes(folder: Path, count: int, rng: np.random.Generator) -> None:
    """Write pictures of 40 x 56: a red or a blue rectangle, or one of each, on gray."""
    colors = np.array([[220, 40, 40], [40, 40, 220]], np.uint8)
    rows = []
    for i in range(count):
        image = np.full((40, 56, 3), rng.integers(90, 160), np.uint8)
        classes = np.full((40, 56), 255, np.uint8)
        things = []
        for kind in rng.permutation(2)[: rng.integers(1, 3)].tolist():
            top = int(rng.integers(0, 20))
            left = int(rng.integers(0, 8)) + 28 * len(things)
            right = left + int(rng.integers(12, 20))
            bottom = top + int(rng.integers(12, 20))
            image[top:bottom, left:right] = colors[kind]
            classes[top:bottom, left:right] = kind
            box = [left, top, right, bottom]
            things.append({"name": ("red", "blue")[kind], "class": kind, "box": box})
        parts = {
            "png": png(image),
            "seg.png": png(classes),
            "json": json.dumps(dict(boxes=things)).encode(),
        }
        rows.append((f"{i:04d}", parts))
    folder.mkdir(parents=True)
    write_shard(folder / "0.tar", rows)
    build_index(folder)


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.mark.slow
def test_the_recipe_runs_and_learns(tmp_path):
    # A model, and a set of scenes.
    data = write_dataset(tmp_path / "pairs")
    pretraining = launch(
        1, "run/pretrain.py", *tiny_run_arguments(data, tmp_path / "run", "samples=64")
    )
    assert pretraining.returncode == 0, pretraining.stderr
    rng = np.random.default_rng(0)
    scenes(tmp_path / "set" / "train", 64, rng)
    scenes(tmp_path / "set" / "test", 12, rng)
    (tmp_path / "set/classnames.txt").write_text("red\nblue\n")

    # The recipe on them.
    changed = dict(
        RUN=tmp_path / "run",
        DATA=tmp_path / "set",
        TEST=12,
        WIDTH=32,
        BATCH=4,
        STEPS=100,
        RATE=3e-3,
        SMALL=dict(
            min_size=40, max_size=56, rpn_post_nms_top_n_train=50, rpn_post_nms_top_n_test=20
        ),
    )
    arguments = []
    for key, value in changed.items():
        literal = str(value) if isinstance(value, Path) else value
        arguments.append(f"{key}={literal!r}")
    out = subprocess.run(
        [sys.executable, "-m", "tests.model.downstream.test_transfer", *arguments],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0, out.stderr
    print(out.stdout)

    # Detection and segmentation, each untrained and trained.
    pairs = re.findall(r"^untrained (.*)\n(?:step.*\n)+trained (.*)$", out.stdout, re.M)
    boxes, classes = (tuple(map(ast.literal_eval, pair)) for pair in pairs)
    assert boxes[0]["bbox_map_50"] < 20
    assert boxes[1]["bbox_map_50"] > 60
    assert boxes[1]["segm_map_50"] > 60
    assert classes[0] < 60
    assert classes[1] > 90


if __name__ == "__main__":
    import glimpse.tests.conftest  # noqa: F401

    changes = {}
    for argument in sys.argv[1:]:
        name, _, text = argument.partition("=")
        changes[name] = ast.literal_eval(text)
    recipe(**changes)
