"""Batches: a pure function of config and position, whoever computes them.

Only visible patches travel, and what a method asks for beside them: the hidden ones, noise, boxes.
Broken samples are replaced alike on any number of ranks.

    bash run/test.sh tests/data/test_loader.py
"""

import io
import json
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from PIL import Image

from glimpse.data.loader import MAX_SUBSTITUTES, Batches, DataConfig, SampleReader, micro_batch_size
from glimpse.data.masking import parse_mask
from glimpse.data.patches import patchify
from glimpse.data.shards import Sample, Shards, write_shard
from glimpse.data.transforms import View, random_view
from glimpse.tests.helpers.tiny import picture
from glimpse.tests.helpers.tiny import write_dataset as make_shards

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
    folder = train or data / "train"
    cfg = DataConfig(
        train=(str(folder),),
        tokenizer=f"sentencepiece({data}/tokenizer.model)",
        context=12,
        workers=workers,
        window=2,
    )
    reader = SampleReader(cfg, views, image_size=32, patch=8, seed=seed, hidden=hidden, noise=noise)
    return Batches(reader, Shards(cfg.train), **{"batch": 16, **more})


def same(a, b):
    """Compare nested dicts, lists and tensors, bit for bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return False
        return all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def joined(parts):
    """Join the parts of a batch to one part."""
    views = {}
    for name, keys in parts[0]["views"].items():
        views[name] = {}
        for key in keys:
            views[name][key] = torch.cat([part["views"][name][key] for part in parts])
    text = {"longest": max(part["text"]["longest"] for part in parts)}
    for key in ("ids", "lengths"):
        text[key] = torch.cat([part["text"][key] for part in parts])
    samples = torch.cat([part["samples"] for part in parts])
    bad = [row for part in parts for row in part["bad"]]
    return dict(views=views, text=text, samples=samples, bad=bad)


def joined_ranks(loaders, start):
    """Join the parts of all ranks' batches at a position."""
    return joined([part for loader in loaders for part in loader[start]])


def test_what_travels(data):
    (part,) = batches(data)[0]

    for name, visible in (("image", 8), ("local", 4)):  # of 16 patches
        patches = part["views"][name]["patches"]
        assert patches.shape == (16, visible, 3 * 8 * 8)
        assert patches.dtype == torch.uint8
        positions = part["views"][name]["positions"]
        assert positions.shape == (16, visible)
        assert positions.dtype == torch.int16
        assert (positions.diff(dim=1) > 0).all(), "ascending"
        assert positions.min() >= 0
        assert positions.max() < 16
    text = part["text"]
    assert text["ids"].dtype == torch.int32
    assert len(text["ids"]) == text["lengths"].sum()
    assert text["longest"] == text["lengths"].max()
    assert part["samples"].shape == (16, 2)
    assert part["samples"].dtype == torch.int64
    assert part["bad"] == []


def test_one_of_several_captions_is_drawn(data):
    """Anew in each epoch, the same one however often it is asked for."""
    reader = batches(data).reader
    texts = ["red", "green", "blue"]
    image = picture("red circle", np.random.default_rng(0))
    sample = Sample("", "", {"png": image, "json": json.dumps({"caption": texts}).encode()})

    def captions():
        return [tuple(reader.prepare(sample, epoch, 7).ids) for epoch in range(30)]

    first = captions()

    assert first == captions()
    assert set(first) == {tuple(reader.tokenizer(text)) for text in texts}


def test_rows_are_what_their_seed_says(data):
    """A row, made again from the pieces.

    The caption is that of the sample, and the patches those of the crop at the places that the mask
    kept.
    """
    loader = batches(data)

    (part,) = loader[48]

    ids = part["text"]["ids"].split(part["text"]["lengths"].tolist())
    for row, (epoch, i) in enumerate(part["samples"].tolist()):
        assert (epoch, i) == loader.order(48 + row)
        sample = loader.shards[i]
        assert ids[row].tolist() == loader.reader.tokenizer(sample.caption)
        for number, name in enumerate(sorted(VIEWS), 1):
            rng = np.random.default_rng((3, epoch, i, number))
            image, _ = random_view(sample.image, 32, VIEWS[name], rng)
            noise = torch.from_numpy(rng.random((1, 16), dtype=np.float32))
            keep = parse_mask(VIEWS[name].mask)(noise, (4, 4))[0]
            patches = patchify(torch.from_numpy(image).permute(2, 0, 1)[None], 8)[0, keep]
            assert torch.equal(part["views"][name]["patches"][row], patches)
            assert part["views"][name]["positions"][row].tolist() == keep.tolist()


def test_workers_change_nothing(data):
    starts = range(0, 160, 16)  # over the end of the first epoch

    alone = list(batches(data, workers=0).iterate(starts, pin_memory=False))
    two = list(batches(data, workers=2).iterate(starts, pin_memory=False))

    assert len(alone) == 10
    assert same(alone, two)


def test_a_share_of_the_shards_is_a_set_of_its_own(data):
    """A run on some of the shards sees those alone, each sample once an epoch.

    It is no continuation of a run on all of them.
    """
    named = data / "train/{00000,00002}.tar"
    every = batches(data)
    some = batches(data, train=named)

    seen = []
    for start in range(0, 80, 16):
        (part,) = some[start]
        seen += some.keys(part)

    expected = []
    for shard in (0, 2):
        expected += [(0, f"{shard:05d}.tar", f"{40 * shard + i:06d}") for i in range(40)]
    assert sorted(seen) == expected
    assert some.fingerprint() != every.fingerprint()
    assert some.fingerprint() == batches(data, train=named).fingerprint()


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_ranks_and_parts_share_the_same_batch(data, world, accumulate):
    (expected,) = batches(data)[112]  # straddles two epochs

    loaders = [batches(data, rank=r, world_size=world, accumulate=accumulate) for r in range(world)]

    for loader in loaders:
        parts = loader[112]
        assert len(parts) == accumulate
        for part in parts:
            assert len(part["samples"]) == 16 // world // accumulate
    assert same(joined_ranks(loaders, 112), expected)


def several(data, **more):
    return batches(data, views=SEVERAL, hidden=("view",), noise=("view",), **more)


def test_what_travels_of_several_views(data):
    (part,) = several(data)[0]

    views = part["views"]
    all_have = {"patches", "positions", "box"}
    asked = {"hidden", "hidden_positions", "noise"}
    assert sorted(views) == ["teacher", "view1", "view2"], "draws by their own names"
    assert set(views["teacher"]) == all_have
    assert set(views["view1"]) == set(views["view2"]) == all_have | asked
    every_patch = [list(range(36))] * 16
    assert views["teacher"]["positions"].tolist() == every_patch, (
        "48 pixels are six patches, none of them hidden"
    )
    for key in views["view1"]:
        assert not torch.equal(views["view1"][key], views["view2"][key])
    (plain,) = batches(data)[0]
    assert all("box" not in view for view in plain["views"].values()), (
        "boxes are of use where one view encloses others"
    )


def test_boxes_are_those_of_the_crops(data):
    loader = several(data)

    (part,) = loader[0]

    boxes = {name: view["box"] for name, view in part["views"].items()}
    assert list(boxes) == ["teacher", "view1", "view2"]
    for box in boxes.values():
        assert box.shape == (16, 4)
        assert box.dtype == torch.float32

    for row, (epoch, i) in enumerate(part["samples"].tolist()):
        image = loader.shards[i].image
        for number, name in ((2, "view1"), (3, "view2")):
            rng = np.random.default_rng((3, epoch, i, number))
            _, expected = random_view(image, 32, SEVERAL["view"], rng)
            assert boxes[name][row].tolist() == list(expected)

        # The teacher's box is the smallest around the views'.
        views = [boxes[name][row].tolist() for name in ("view1", "view2")]
        tops, lefts, rows, columns = zip(*views)
        bottoms = [top + height for top, height in zip(tops, rows)]
        rights = [left + width for left, width in zip(lefts, columns)]
        top, left, height, width = boxes["teacher"][row].tolist()
        assert (top, left) == (min(tops), min(lefts))
        assert (top + height, left + width) == (max(bottoms), max(rights))


@pytest.mark.parametrize("mask", ["random(0.5)", "gaussian(0.75)", "inverse_gaussian(0.9)"])
def test_visible_and_hidden_patches_are_the_whole_view(data, mask):
    view = View(flip=True, mask=mask, blur=0.5)
    masked = {"image": view, "local": VIEWS["local"]}
    unmasked = {**masked, "image": replace(view, mask="none")}

    (part,) = batches(data, views=masked, hidden=("image",))[0]

    assert "hidden" not in part["views"]["local"], "only where a method asks"
    image = part["views"]["image"]
    visible = parse_mask(mask).visible_count(16)
    assert image["hidden"].shape == (16, 16 - visible, 192)
    assert image["hidden"].dtype == torch.uint8
    assert image["hidden_positions"].dtype == torch.int16
    assert (image["hidden_positions"].diff(dim=1) > 0).all(), "ascending"

    # Both together are the view without its mask, in another order.
    patches = torch.cat([image["patches"], image["hidden"]], dim=1)
    positions = torch.cat([image["positions"], image["hidden_positions"]], dim=1)
    assert (positions.sort(dim=1).values == torch.arange(16)).all(), "each patch is on one side"
    (plain,) = batches(data, views=unmasked)[0]
    every_patch = plain["views"]["image"]["patches"]
    assert torch.equal(patches, every_patch.take_along_dim(positions.long()[:, :, None], dim=1))


def test_noise(data):
    (part,) = several(data)[0]

    for name in ("view1", "view2"):
        noise = part["views"][name]["noise"]
        assert noise.shape == (16, 16)
        assert noise.dtype == torch.float32
        # uniform in [0, 1), and another one for each image
        assert noise.min() >= 0
        assert noise.max() < 1
        assert abs(noise.mean() - 0.5) < 0.08
        assert noise.std() > 0.25
        assert len(noise.unique(dim=0)) == 16
        largest = noise.argsort(dim=1, descending=True)[:, :4]
        places = largest.sort(dim=1).values.short()
        assert not torch.equal(places, part["views"][name]["positions"][:, :4]), (
            "not the noise that the mask used"
        )
    (plain,) = batches(data)[0]
    assert all("noise" not in view for view in plain["views"].values())


@pytest.mark.parametrize("world, accumulate", [(1, 4), (2, 2), (4, 1)])
def test_ranks_and_parts_share_several_views(data, world, accumulate):
    (expected,) = several(data)[112]

    loaders = [several(data, rank=r, world_size=world, accumulate=accumulate) for r in range(world)]

    assert same(joined_ranks(loaders, 112), expected)


def test_workers_change_nothing_of_several_views(data):
    starts = range(96, 144, 16)

    alone = list(several(data, workers=0).iterate(starts, pin_memory=False))
    two = list(several(data, workers=2).iterate(starts, pin_memory=False))

    assert len(alone) == 3
    assert same(alone, two)


@pytest.mark.parametrize("asked", ["hidden", "noise"])
def test_an_enlarged_view_may_be_asked_for_more(data, asked):
    teacher = replace(SEVERAL["teacher"], enlarge=True, mask="random(0.5)")
    views = {**SEVERAL, "teacher": teacher}

    (part,) = batches(data, views=views, **{asked: ("teacher",)})[0]

    count = {"hidden": 18, "noise": 36}[asked]  # of 36 patches
    assert part["views"]["teacher"][asked].shape[:2] == (16, count)


def test_a_view_that_makes_no_patches_is_named(data):
    views = {**SEVERAL, "teacher": View(encloses=("view",), size=50)}

    with pytest.raises(
        ValueError,
        match="views.teacher: an image of 50 x 50 pixels does not divide into patches of 8",
    ):
        batches(data, views=views)


def test_a_batch_that_does_not_divide():
    with pytest.raises(ValueError, match="nearest: 12 or 18"):
        micro_batch_size(16, 3, 2)
    with pytest.raises(ValueError, match="nearest: 8"):
        micro_batch_size(6, 4, 2)


def test_a_batch_over_the_end_of_an_epoch(data):
    """Every sample once in each epoch.

    Also where a batch holds the end of one and the beginning of the next.
    """
    loader = batches(data)

    samples = torch.cat([loader[start][0]["samples"] for start in range(0, 240, 16)])

    expected = list(product((0, 1), range(120)))  # (epoch, sample)
    assert sorted(map(tuple, samples.tolist())) == expected
    epochs = loader[112][0]["samples"][:, 0]
    assert set(epochs.tolist()) == {0, 1}

    (huge,) = batches(data, batch=300)[0]
    counts = huge["samples"][:, 0].bincount()
    assert counts.tolist() == [120, 120, 60], "a batch larger than the data"


def test_crops_and_masks_change_with_the_epoch_and_nothing_else(data):
    sample = Shards([data / "train"])[5]

    def views_of(epoch, **how):
        return batches(data, **how).reader.prepare(sample, epoch, 5).views

    first, other, again = (views_of(epoch) for epoch in (0, 1, 0))

    for name in VIEWS:
        assert not np.array_equal(first[name]["positions"], other[name]["positions"]), (
            "the mask changes"
        )
        for key in first[name]:
            assert np.array_equal(first[name][key], again[name][key])

    unmasked = {name: replace(view, mask="none") for name, view in VIEWS.items()}
    crops = [views_of(epoch, views=unmasked)["image"]["patches"] for epoch in (0, 1)]
    assert not np.array_equal(*crops), "the crop changes"

    turned = views_of(0, views=dict(reversed(VIEWS.items())))
    for name in VIEWS:
        for key in first[name]:
            assert np.array_equal(first[name][key], turned[name][key]), (
                "the order in the YAML does not matter"
            )

    seeded = views_of(0, seed=4)
    assert not np.array_equal(first["image"]["positions"], seeded["image"]["positions"])


def broken(folder, which):
    """24 pairs of which some cannot be read: a cut image, no image, no caption, by turns."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(24):
        image = picture("red circle", rng, "jpg")
        parts = {"jpg": image, "txt": f"number {i}".encode()}
        if i in which:
            cut = {**parts, "jpg": image[:150]}
            parts = (cut, {"txt": b"x"}, {"jpg": image})[i % 3]
        rows.append((f"{i:03d}", parts))
    folder.mkdir()
    write_shard(folder / "0.tar", rows)
    return folder


def test_a_broken_sample_is_replaced_named_and_alone(data, tmp_path):
    which = (3, 7, 11)
    (good,) = batches(data, train=broken(tmp_path / "good", ()))[0]
    bad = broken(tmp_path / "bad", which)

    loaders = [batches(data, train=bad, rank=rank, world_size=2) for rank in (0, 1)]
    part = joined_ranks(loaders, 0)

    hit = [row for row, (_, i) in enumerate(good["samples"].tolist()) if i in which]
    assert hit, "the batch meets some of them"
    named = {(shard, key) for shard, key, _ in part["bad"]}
    assert named <= {("0.tar", "003"), ("0.tar", "007"), ("0.tar", "011")}
    for row, (epoch, i) in enumerate(good["samples"].tolist()):
        if row in hit:
            assert ("0.tar", f"{i:03d}") in named
            continue
        assert part["samples"][row].tolist() == [epoch, i]
        for name in VIEWS:
            patches = part["views"][name]["patches"][row]
            expected = good["views"][name]["patches"][row]
            assert torch.equal(patches, expected), "neighbors are as they were"
    trained_on = {i for _, i in part["samples"].tolist()}
    assert not trained_on.intersection(which), "what is named as trained on was"

    alone = batches(data, train=bad)
    assert same(alone[0][0], part), "the substitutes are the same on one rank"
    reasons = ""
    for start in range(0, 96, 16):
        for _, _, reason in alone[start][0]["bad"]:
            reasons += reason
    assert "no image: has txt" in reasons
    assert "no caption: has jpg" in reasons
    assert "cannot read the image" in reasons


def test_nothing_readable_ends_the_run(data, tmp_path):
    loader = batches(data, train=broken(tmp_path / "bad", range(24)))

    with pytest.raises(
        ValueError,
        match=f"{MAX_SUBSTITUTES} samples in a row cannot be read, the last 0.tar .*prepare.py check",
    ):
        loader[0]


def test_keys(data):
    loader = batches(data)
    (part,) = loader[112]

    keys = loader.keys(part)

    for (epoch, i), key in zip(part["samples"].tolist(), keys, strict=True):
        sample = loader.shards[i]
        assert key == (epoch, sample.shard, sample.key)
        assert sample.shard == f"{int(sample.key) // 40:05d}.tar"


def test_pad_text(data):
    cfg = replace(batches(data).reader.cfg, pad_text=True)
    reader = SampleReader(cfg, VIEWS, image_size=32, patch=8, seed=0)
    (plain,) = batches(data, seed=0)[0]

    (part,) = Batches(reader, Shards(cfg.train), batch=16)[0]

    text = part["text"]
    assert text["lengths"].tolist() == [12] * 16
    assert text["longest"] == 12
    captions = plain["text"]["ids"].split(plain["text"]["lengths"].tolist())
    for row, ids in zip(text["ids"].view(16, 12), captions):
        padding = [reader.tokenizer.pad_id] * (12 - len(ids))
        assert row.tolist() == ids.tolist() + padding


def test_grey_and_palette_pictures_join_a_batch(data, tmp_path):
    rows = []
    for i, mode in enumerate(("L", "P", "RGBA", "I;16", "CMYK", "1")):
        out = io.BytesIO()
        Image.new(mode, (20, 33)).save(out, "TIFF" if mode == "CMYK" else "PNG")
        rows.append((f"{i}", {"png": out.getvalue(), "txt": b"x"}))
    write_shard(tmp_path / "0.tar", rows)

    (part,) = batches(data, train=tmp_path, batch=6)[0]

    assert part["bad"] == []
    assert part["views"]["image"]["patches"].shape == (6, 8, 192)
