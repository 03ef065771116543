"""The recipe of docs/transfer.md is one script that runs and learns: its blocks are executed as
they stand, on a tiny set.

Run: pytest tests/model/downstream/test_transfer.py -s
On a CPU build of torch, whose torchvision has no compiled operators (tests/conftest.py), plain ones
take their place.
Elsewhere the recipe itself, with what it prints: python -m tests.test_transfer "RUN='runs/mine'"
STEPS=100
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
from glimpse.tests.helpers.tiny import ROOT, environment, launch, settings, shards


def nms(boxes, scores, threshold):
    """torchvision's, in numpy."""
    from torchvision.ops import box_iou

    order = scores.argsort(descending=True, stable=True)
    covers = (box_iou(boxes[order], boxes[order]) > threshold).numpy()
    kept = np.ones(len(order), bool)
    for i in range(len(order)):
        if kept[i]:
            kept[i + 1 :] &= ~covers[i, i + 1 :]
    return order[torch.from_numpy(kept)]


def roi_align(maps, boxes, output_size, spatial_scale=1.0, sampling_ratio=-1, aligned=False):
    """torchvision's for boxes inside the image: the mean of bilinear samples in each bin.

    maps (B, C, H, W), boxes (N, 5): image and box -> (N, C, *output_size).
    """
    made, (height, width) = maps.new_zeros(len(boxes), maps.shape[1], *output_size), maps.shape[2:]
    for image in boxes[:, 0].unique():
        mine = (boxes[:, 0] == image).nonzero()[:, 0]
        left, top, right, bottom = (boxes[mine, 1:] * spatial_scale).unbind(1)
        across, down = (right - left).clamp(min=1), (bottom - top).clamp(min=1)
        ratio = (
            sampling_ratio
            if sampling_ratio > 0
            else math.ceil(max((across / output_size[1]).max(), (down / output_size[0]).max()))
        )
        x, y = (
            first[:, None] + length[:, None] * (torch.arange(n * ratio) + 0.5) / (n * ratio)
            for first, length, n in ((left, across, output_size[1]), (top, down, output_size[0]))
        )
        x, y = 2 * x / max(1, width - 1) - 1, 2 * y / max(1, height - 1) - 1
        # (N, rows, columns, 2)
        grid = torch.stack(torch.broadcast_tensors(x[:, None], y[:, :, None]), 3)
        found = F.grid_sample(
            maps[int(image)][None],
            grid.flatten(0, 1)[None],
            padding_mode="border",
            align_corners=True,
        )
        made = made.index_copy(
            0, mine, F.avg_pool2d(found, ratio)[0].unflatten(1, (len(mine), -1)).transpose(0, 1)
        )
    return made


def plain_operators():
    """Put the two in the place of torchvision's compiled ones, where these cannot be loaded."""
    import torchvision

    if not torchvision.extension._has_ops():
        torchvision.ops.boxes.nms = nms
        torchvision.ops.poolers.roi_align = torchvision.models.detection.roi_heads.roi_align = (
            roi_align
        )


def recipe(**changed) -> dict:
    """Execute the blocks of docs/transfer.md in order, with other values for the names in capitals;
    returns what they define.
    """
    plain_operators()
    names = {}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs/transfer.md").read_text(), re.S):
        exec(compile(block, "docs/transfer.md", "exec"), names)
        names.update({key: value for key, value in changed.items() if key in names})
    return names


def scenes(folder: Path, count: int, rng: np.random.Generator) -> None:
    """A red or a blue rectangle, or one of each, on grey: pictures of 40 x 56."""
    colours = np.array([[220, 40, 40], [40, 40, 220]], np.uint8)
    rows = []
    for i in range(count):
        image, classes, things = (
            np.full((40, 56, 3), rng.integers(90, 160), np.uint8),
            np.full((40, 56), 255, np.uint8),
            [],
        )
        for kind in rng.permutation(2)[: rng.integers(1, 3)].tolist():
            top, left = int(rng.integers(0, 20)), int(rng.integers(0, 8)) + 28 * len(things)
            box = [left, top, left + int(rng.integers(12, 20)), top + int(rng.integers(12, 20))]
            where = slice(box[1], box[3]), slice(box[0], box[2])
            image[where], classes[where] = colours[kind], kind
            things.append({"name": ("red", "blue")[kind], "class": kind, "box": box})
        rows.append(
            (
                f"{i:04d}",
                {
                    "png": png(image),
                    "seg.png": png(classes),
                    "json": json.dumps(dict(boxes=things)).encode(),
                },
            )
        )
    folder.mkdir(parents=True)
    write_shard(folder / "0.tar", rows)
    build_index(folder)


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.mark.slow
def test_the_recipe_runs_and_learns(tmp_path):
    pairs, rng = shards(tmp_path / "pairs"), np.random.default_rng(0)
    made = launch(1, "run/pretrain.py", *settings(pairs, tmp_path / "run", "samples=64"))
    assert made.returncode == 0, made.stderr
    for part, count in (("train", 64), ("test", 12)):
        scenes(tmp_path / "set" / part, count, rng)
    (tmp_path / "set/classnames.txt").write_text("red\nblue\n")
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
    told = [
        f"{key}={str(value)!r}" if isinstance(value, Path) else f"{key}={value!r}"
        for key, value in changed.items()
    ]
    out = subprocess.run(
        [sys.executable, "-m", "tests.test_transfer", *told],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0, out.stderr
    print(out.stdout)
    pairs = re.findall(r"^untrained (.*)\n(?:step.*\n)+trained (.*)$", out.stdout, re.M)
    boxes, classes = (tuple(map(ast.literal_eval, pair)) for pair in pairs)
    assert (
        boxes[0]["bbox_map_50"] < 20
        and boxes[1]["bbox_map_50"] > 60
        and boxes[1]["segm_map_50"] > 60
    )
    assert classes[0] < 60 and classes[1] > 90


if __name__ == "__main__":
    import glimpse.tests.conftest  # noqa: F401

    recipe(
        **{
            key: ast.literal_eval(value)
            for key, _, value in (argument.partition("=") for argument in sys.argv[1:])
        }
    )
