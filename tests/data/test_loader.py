"""Batches: a pure function of config and position, whoever computes them; only visible patches
travel, and what a method asks for beside them: the hidden ones, noise, boxes; broken samples are
replaced alike.

    bash run/test.sh tests/data/test_loader.py
"""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from glimpse.data.loader import SUBSTITUTES, Batches, DataConfig, Reader, share
from glimpse.data.masking import parse
from glimpse.data.patches import patchify
from glimpse.data.shards import Sample, Shards, write_shard
from glimpse.data.transforms import View, random_view
from glimpse.tests.helpers.tiny import picture
from glimpse.tests.helpers.tiny import shards as make_shards

VIEWS = {
    "image": View(crop=(0.5, 1.0), flip=True, mask="random(0.5)"),
    "local": View(crop=(0.1, 0.4), mask="gaussian(0.75)"),
}
SEVERAL = {
    "view": View(
        crop=(0.2, 0.5), count=2, mask="random(0.75)", jitter=(0.4, 0.4, 0.2, 0.1), grey=0.2
    ),
    "teacher": View(encloses=("view",), size=48),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("batches"))


def batches(data, *, views=VIEWS, seed=3, train=None, workers=0, hidden=(), noise=(), **more):
    """Batches of 16 from three shards of 40 samples."""
    cfg = DataConfig(
        train=(str(train or data / "train"),),
        tokenizer=f"sentencepiece({data}/tokenizer.model)",
        context=12,
        workers=workers,
        window=2,
    )
    reader = Reader(cfg, views, image_size=32, patch=8, seed=seed, hidden=hidden, noise=noise)
    return Batches(reader, Shards(cfg.train), **{"batch": 16, **more})


def same(a, b):
    """Nested dicts, lists and tensors, bit for bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    return a == b


def joined(parts):
    """Parts of a batch as one part."""
    views = {
        v: {k: torch.cat([p["views"][v][k] for p in parts]) for k in keys}
        for v, keys in parts[0]["views"].items()
    }
    text = {k: torch.cat([p["text"][k] for p in parts]) for k in ("ids", "lengths")}
    return dict(
        views=views,
        text=dict(text, longest=max(p["text"]["longest"] for p in parts)),
        samples=torch.cat([p["samples"] for p in parts]),
        bad=[b for p in parts for b in p["bad"]],
    )


def test_what_travels(data):
    (part,) = batches(data)[0]
    for name, K in (("image", 8), ("local", 4)):  # of 16 patches
        view = part["views"][name]
        assert view["patches"].shape == (16, K, 3 * 8 * 8) and view["patches"].dtype == torch.uint8
        assert view["positions"].shape == (16, K) and view["positions"].dtype == torch.int16
        assert (
            (view["positions"].diff(dim=1) > 0).all()
            and view["positions"].min() >= 0
            and view["positions"].max() < 16
        )
    text = part["text"]
    assert (
        text["ids"].dtype == torch.int32
        and len(text["ids"]) == text["lengths"].sum()
        and text["longest"] == text["lengths"].max()
    )
    assert (
        part["samples"].shape == (16, 2)
        and part["samples"].dtype == torch.int64
        and part["bad"] == []
    )


def test_one_of_several_captions_is_drawn(data):
    """Anew in each epoch, the same one however often it is asked for."""
    reader, texts = batches(data).reader, ["red", "green", "blue"]
    several = Sample(
        "",
        "",
        {
            "png": picture("red circle", np.random.default_rng(0)),
            "json": json.dumps({"caption": texts}).encode(),
        },
    )
    drawn = [[tuple(reader.row(several, epoch, 7).ids) for epoch in range(30)] for _ in range(2)]
    assert drawn[0] == drawn[1] and set(drawn[0]) == {
        tuple(reader.tokenizer(text)) for text in texts
    }


def test_rows_are_what_their_seed_says(data):
    """A row, made again from the pieces: caption of that very sample, patches of that very crop at
    the places that the mask kept.
    """
    loader = batches(data)
    (part,) = loader[48]
    ids = part["text"]["ids"].split(part["text"]["lengths"].tolist())
    for row, (epoch, i) in enumerate(part["samples"].tolist()):
        assert (epoch, i) == loader.order(48 + row)
        sample = loader.shards[i]
        assert ids[row].tolist() == loader.reader.tokenizer(sample.caption)
        for n, name in enumerate(sorted(VIEWS)):
            rng = np.random.default_rng((3, epoch, i, 1 + n))
            image, _ = random_view(sample.image, 32, VIEWS[name], rng)
            keep = parse(VIEWS[name].mask)(
                torch.from_numpy(rng.random((1, 16), dtype=np.float32)), (4, 4)
            )
            patches = patchify(torch.from_numpy(image).permute(2, 0, 1)[None], 8)[0, keep[0]]
            assert torch.equal(part["views"][name]["patches"][row], patches)
            assert part["views"][name]["positions"][row].tolist() == keep[0].tolist()


def test_workers_change_nothing(data):
    starts = range(0, 160, 16)  # over the end of the first epoch
    alone, two = (list(batches(data, workers=w).stream(starts, pin=False)) for w in (0, 2))
    assert len(alone) == 10 and same(alone, two)


def test_a_share_of_the_shards_is_a_set_of_its_own(data):
    """A run on some of the shards sees those alone, each sample once an epoch; it is no
    continuation of a run on all of them.
    """
    named = data / "train/{00000,00002}.tar"
    whole, some = batches(data), batches(data, train=named)
    seen = [key for start in range(0, 80, 16) for part in some[start] for key in some.keys(part)]
    assert sorted(seen) == [
        (0, f"{shard:05d}.tar", f"{40 * shard + i:06d}") for shard in (0, 2) for i in range(40)
    ]
    assert whole.fingerprint() != some.fingerprint() == batches(data, train=named).fingerprint()


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_ranks_and_parts_share_the_same_batch(data, world, accumulate):
    (whole,) = batches(data)[112]  # straddles two epochs
    shares = [batches(data, rank=r, world=world, accumulate=accumulate)[112] for r in range(world)]
    assert all(
        len(parts) == accumulate and len(p["samples"]) == 16 // world // accumulate
        for parts in shares
        for p in parts
    )
    assert same(joined([p for parts in shares for p in parts]), whole)


def several(data, **more):
    return batches(data, views=SEVERAL, hidden=("view",), noise=("view",), **more)


def test_what_travels_of_several_views(data):
    (part,) = several(data)[0]
    all_have, asked = {"patches", "positions", "box"}, {"hidden", "hidden_positions", "noise"}
    assert {name: set(view) for name, view in part["views"].items()} == {
        "teacher": all_have,
        "view1": all_have | asked,
        "view2": all_have | asked,
    }, "draws by their own names"
    assert part["views"]["teacher"]["positions"].tolist() == [list(range(36))] * 16, (
        "48 pixels are six patches, none of them hidden"
    )
    first, second = part["views"]["view1"], part["views"]["view2"]
    assert not any(torch.equal(first[key], second[key]) for key in first)
    assert all("box" not in view for view in batches(data)[0][0]["views"].values()), (
        "boxes are of use where one view encloses others"
    )


def test_boxes_are_those_of_the_crops(data):
    loader = several(data)
    (part,) = loader[0]
    for row, (epoch, i) in enumerate(part["samples"].tolist()):
        boxes = {name: view["box"][row].tolist() for name, view in part["views"].items()}
        for n, name in enumerate(("teacher", "view1", "view2")):
            assert (
                part["views"][name]["box"].shape == (16, 4)
                and part["views"][name]["box"].dtype == torch.float32
            )
            if name != "teacher":
                _, box = random_view(
                    loader.shards[i].image,
                    32,
                    SEVERAL["view"],
                    np.random.default_rng((3, epoch, i, 1 + n)),
                )
                assert boxes[name] == list(box)
        top, left, rows, columns = boxes.pop("teacher")
        assert [top, left] == [min(box[axis] for box in boxes.values()) for axis in (0, 1)]
        assert [top + rows, left + columns] == [
            max(box[axis] + box[2 + axis] for box in boxes.values()) for axis in (0, 1)
        ]


@pytest.mark.parametrize("mask", ["random(0.5)", "gaussian(0.75)", "inverse_gaussian(0.9)"])
def test_visible_and_hidden_patches_are_the_whole_view(data, mask):
    view = View(flip=True, mask=mask, blur=0.5)
    found = batches(data, views={"image": view, "local": VIEWS["local"]}, hidden=("image",))[0][0][
        "views"
    ]
    whole = batches(data, views={"image": replace(view, mask="none"), "local": VIEWS["local"]})[0][
        0
    ]["views"]["image"]["patches"]
    image, K = found["image"], parse(mask).visible(16)
    assert "hidden" not in found["local"], "only where a method asks"
    assert image["hidden"].shape == (16, 16 - K, 192) and image["hidden"].dtype == torch.uint8
    assert (
        image["hidden_positions"].dtype == torch.int16
        and (image["hidden_positions"].diff(dim=1) > 0).all()
    )
    patches, positions = (
        torch.cat([image[a], image[b]], dim=1)
        for a, b in (("patches", "hidden"), ("positions", "hidden_positions"))
    )
    assert (positions.sort(dim=1).values == torch.arange(16)).all(), "each patch is on one side"
    assert torch.equal(patches, whole.take_along_dim(positions.long()[:, :, None], dim=1))


def test_noise(data):
    (part,) = several(data)[0]
    for name in ("view1", "view2"):
        noise = part["views"][name]["noise"]
        assert (
            noise.shape == (16, 16)
            and noise.dtype == torch.float32
            and noise.min() >= 0
            and noise.max() < 1
        )
        assert (
            abs(noise.mean() - 0.5) < 0.08 and noise.std() > 0.25 and len(noise.unique(dim=0)) == 16
        )
        order = noise.argsort(dim=1, descending=True)[:, :4].sort(dim=1).values
        assert not torch.equal(order.short(), part["views"][name]["positions"][:, :4]), (
            "not the noise that the mask used"
        )
    assert all("noise" not in view for view in batches(data)[0][0]["views"].values())


@pytest.mark.parametrize("world, accumulate", [(1, 4), (2, 2), (4, 1)])
def test_ranks_and_parts_share_several_views(data, world, accumulate):
    shares = [
        several(data, rank=rank, world=world, accumulate=accumulate)[112] for rank in range(world)
    ]
    assert same(joined([part for parts in shares for part in parts]), several(data)[112][0])


def test_workers_change_nothing_of_several_views(data):
    alone, two = (
        list(several(data, workers=workers).stream(range(96, 144, 16), pin=False))
        for workers in (0, 2)
    )
    assert len(alone) == 3 and same(alone, two)


@pytest.mark.parametrize("asked", ["hidden", "noise"])
def test_an_enlarged_view_may_be_asked_for_more(data, asked):
    views = {**SEVERAL, "teacher": replace(SEVERAL["teacher"], enlarge=True, mask="random(0.5)")}
    (part,) = batches(data, views=views, **{asked: ("teacher",)})[0]
    assert part["views"]["teacher"][asked].shape[:2] == (16, 18 if asked == "hidden" else 36)


def test_a_view_that_makes_no_patches_is_named(data):
    with pytest.raises(
        ValueError,
        match="views.teacher: an image of 50 x 50 pixels does not divide into patches of 8",
    ):
        batches(data, views={**SEVERAL, "teacher": View(encloses=("view",), size=50)})


def test_a_batch_that_does_not_divide():
    with pytest.raises(ValueError, match="nearest: 12 or 18"):
        share(16, 3, 2)
    with pytest.raises(ValueError, match="nearest: 8"):
        share(6, 4, 2)


def test_a_batch_over_the_end_of_an_epoch(data):
    """Every sample once in each epoch, also where a batch holds the end of one and the beginning of
    the next.
    """
    loader = batches(data)
    found = torch.cat([loader[start][0]["samples"] for start in range(0, 240, 16)]).tolist()
    assert sorted(map(tuple, found)) == [(e, i) for e in (0, 1) for i in range(120)]
    assert {e for e, _ in loader[112][0]["samples"].tolist()} == {0, 1}
    (huge,) = batches(data, batch=300)[0]
    assert huge["samples"][:, 0].bincount().tolist() == [
        120,
        120,
        60,
    ], "a batch larger than the data"


def test_crops_and_masks_change_with_the_epoch_and_nothing_else(data):
    reader = batches(data).reader
    sample = Shards([data / "train"])[5]
    first, other, again = (reader.row(sample, epoch, 5).views for epoch in (0, 1, 0))
    assert all(
        np.array_equal(first[name][key], again[name][key]) for name in VIEWS for key in first[name]
    )
    for name in VIEWS:
        assert not np.array_equal(first[name]["positions"], other[name]["positions"]), (
            "the mask changes"
        )
    whole = {name: replace(view, mask="none") for name, view in VIEWS.items()}
    crops = [
        batches(data, views=whole).reader.row(sample, epoch, 5).views["image"]["patches"]
        for epoch in (0, 1)
    ]
    assert not np.array_equal(*crops), "the crop changes"
    turned = batches(data, views=dict(reversed(VIEWS.items()))).reader.row(sample, 0, 5).views
    same_rows = (
        np.array_equal(first[name][key], turned[name][key]) for name in VIEWS for key in first[name]
    )
    assert all(same_rows), "the order in the YAML does not matter"
    seeded = batches(data, seed=4).reader.row(sample, 0, 5).views
    assert not np.array_equal(first["image"]["positions"], seeded["image"]["positions"])


def broken(folder, which):
    """24 pairs of which some cannot be read: a cut image, no image, no caption, by turns."""
    rng, rows = np.random.default_rng(0), []
    for i in range(24):
        image = picture("red circle", rng, "jpg")
        parts = {"jpg": image, "txt": f"number {i}".encode()}
        if i in which:
            parts = ({**parts, "jpg": image[:150]}, {"txt": b"x"}, {"jpg": image})[i % 3]
        rows.append((f"{i:03d}", parts))
    folder.mkdir()
    write_shard(folder / "0.tar", rows)
    return folder


def test_a_broken_sample_is_replaced_named_and_alone(data, tmp_path):
    (wanted,) = batches(data, train=broken(tmp_path / "good", ()))[0]
    bad = broken(tmp_path / "bad", (3, 7, 11))
    whole = joined([batches(data, train=bad, rank=rank, world=2)[0][0] for rank in (0, 1)])
    hit = [row for row, (_, i) in enumerate(wanted["samples"].tolist()) if i in (3, 7, 11)]
    assert hit, "the batch meets some of them"
    assert {("0.tar", f"{wanted['samples'][row, 1]:03d}") for row in hit} <= {
        (shard, key) for shard, key, _ in whole["bad"]
    }
    assert {(shard, key) for shard, key, _ in whole["bad"]} <= {
        ("0.tar", "003"),
        ("0.tar", "007"),
        ("0.tar", "011"),
    }
    for row in set(range(16)) - set(hit):
        for name in VIEWS:
            assert torch.equal(
                whole["views"][name]["patches"][row], wanted["views"][name]["patches"][row]
            ), "neighbours are as they were"
        assert whole["samples"][row].tolist() == wanted["samples"][row].tolist()
    assert not {3, 7, 11} & {i for _, i in whole["samples"].tolist()}, (
        "what is named as trained on was"
    )
    alone = batches(data, train=bad)
    assert same(alone[0][0], whole), "the substitutes are the same on one rank"
    reasons = " ".join(why for start in range(0, 96, 16) for _, _, why in alone[start][0]["bad"])
    assert (
        "no image: has txt" in reasons
        and "no caption: has jpg" in reasons
        and "cannot read the image" in reasons
    )


def test_nothing_readable_ends_the_run(data, tmp_path):
    with pytest.raises(
        ValueError,
        match=f"{SUBSTITUTES} samples in a row cannot be read, the last 0.tar .*prepare.py check",
    ):
        batches(data, train=broken(tmp_path / "bad", range(24)))[0]


def test_keys(data):
    loader = batches(data)
    (part,) = loader[112]
    found = loader.keys(part)
    assert [
        (epoch, loader.shards[i].shard, loader.shards[i].key)
        for epoch, i in part["samples"].tolist()
    ] == found
    assert all(shard == f"{int(key) // 40:05d}.tar" for _, shard, key in found)


def test_pad_text(data):
    cfg = replace(batches(data).reader.cfg, pad_text=True)
    loader = Batches(
        Reader(cfg, VIEWS, image_size=32, patch=8, seed=0), Shards(cfg.train), batch=16
    )
    text = loader[0][0]["text"]
    assert text["lengths"].tolist() == [12] * 16 and text["longest"] == 12
    padded, plain = text["ids"].view(16, 12), batches(data, seed=0)[0][0]["text"]
    for row, ids in zip(padded, plain["ids"].split(plain["lengths"].tolist())):
        assert row.tolist() == ids.tolist() + [loader.reader.tokenizer.pad_id] * (12 - len(ids))


def test_grey_and_palette_pictures_join_a_batch(data, tmp_path):
    rows = []
    for i, mode in enumerate(("L", "P", "RGBA", "I;16", "CMYK", "1")):
        out = io.BytesIO()
        Image.new(mode, (20, 33)).save(out, "TIFF" if mode == "CMYK" else "PNG")
        rows.append((f"{i}", {"png": out.getvalue(), "txt": b"x"}))
    write_shard(tmp_path / "0.tar", rows)
    (part,) = batches(data, train=tmp_path, batch=6)[0]
    assert part["bad"] == [] and part["views"]["image"]["patches"].shape == (6, 8, 192)
