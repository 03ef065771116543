"""The loader: a batch is a pure function of the config and the position in the run.

Batches contain the visible patches and only those other inputs that the method uses: hidden
patches, noise, boxes. Broken samples are replaced by the same substitutes on any number of ranks.

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
SEVERAL_VIEWS = {
    "view": View(
        crop=(0.2, 0.5), count=2, mask="random(0.75)", jitter=(0.4, 0.4, 0.2, 0.1), grey=0.2
    ),
    "teacher": View(encloses=("view",), size=48),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("batches"))


def make_batches(
    data, *, views=VIEWS, seed=3, train=None, workers=0, hidden=(), noise=(), **options
):
    """Batches of 16 from three shards of 40 samples; options: of Batches."""
    folder = train or data / "train"
    cfg = DataConfig(
        train=(str(folder),),
        tokenizer=f"sentencepiece({data}/tokenizer.model)",
        context=12,
        workers=workers,
        window=2,
    )
    reader = SampleReader(cfg, views, image_size=32, patch=8, seed=seed, hidden=hidden, noise=noise)
    options = {"batch": 16, **options}
    return Batches(reader, Shards(cfg.train), **options)


def equal(a, b):
    """Compare nested dicts, lists and tensors, bit for bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return False
        return all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def concatenate(micro_batches):
    """Concatenate micro-batches to one."""
    views = {}
    for name, keys in micro_batches[0]["views"].items():
        views[name] = {}
        for key in keys:
            arrays = [micro_batch["views"][name][key] for micro_batch in micro_batches]
            views[name][key] = torch.cat(arrays)
    text = {"longest": max(micro_batch["text"]["longest"] for micro_batch in micro_batches)}
    for key in ("ids", "lengths"):
        text[key] = torch.cat([micro_batch["text"][key] for micro_batch in micro_batches])
    samples = torch.cat([micro_batch["samples"] for micro_batch in micro_batches])
    bad = [row for micro_batch in micro_batches for row in micro_batch["bad"]]
    return dict(views=views, text=text, samples=samples, bad=bad)


def concatenate_ranks(loaders, start):
    """Concatenate the micro-batches of all ranks at a position."""
    return concatenate([micro_batch for loader in loaders for micro_batch in loader[start]])


def test_what_travels(data):
    (micro_batch,) = make_batches(data)[0]

    for name, visible in (("image", 8), ("local", 4)):  # of 16 patches
        patches = micro_batch["views"][name]["patches"]
        assert patches.shape == (16, visible, 3 * 8 * 8)
        assert patches.dtype == torch.uint8
        positions = micro_batch["views"][name]["positions"]
        assert positions.shape == (16, visible)
        assert positions.dtype == torch.int16
        assert (positions.diff(dim=1) > 0).all(), "ascending"
        assert positions.min() >= 0
        assert positions.max() < 16
    text = micro_batch["text"]
    assert text["ids"].dtype == torch.int32
    assert len(text["ids"]) == text["lengths"].sum()
    assert text["longest"] == text["lengths"].max()
    assert micro_batch["samples"].shape == (16, 2)
    assert micro_batch["samples"].dtype == torch.int64
    assert micro_batch["bad"] == []


def test_one_of_several_captions_is_drawn(data):
    """The choice depends on the epoch, and on nothing that was read before."""
    reader = make_batches(data).reader
    texts = ["red", "green", "blue"]
    image = picture("red circle", np.random.default_rng(0))
    sample = Sample("", "", {"png": image, "json": json.dumps({"caption": texts}).encode()})

    def read_epochs():
        return [tuple(reader.prepare(sample, epoch, 7).ids) for epoch in range(30)]

    first = read_epochs()

    assert first == read_epochs()
    assert set(first) == {tuple(reader.tokenizer(text)) for text in texts}


def test_batches_follow_from_the_seed(data):
    """Batches are recomputed here from the seeds that data/loader.py documents.

    The caption is that of the sample. The patches are those of the crop at the positions that the
    mask keeps.
    """
    loader = make_batches(data)

    (micro_batch,) = loader[48]

    ids = micro_batch["text"]["ids"].split(micro_batch["text"]["lengths"].tolist())
    for row, (epoch, i) in enumerate(micro_batch["samples"].tolist()):
        assert (epoch, i) == loader.order(48 + row)
        sample = loader.shards[i]
        assert ids[row].tolist() == loader.reader.tokenizer(sample.caption)
        for number, name in enumerate(sorted(VIEWS), 1):
            rng = np.random.default_rng((3, epoch, i, number))
            image, _ = random_view(sample.image, 32, VIEWS[name], rng)
            noise = torch.from_numpy(rng.random((1, 16), dtype=np.float32))
            keep = parse_mask(VIEWS[name].mask)(noise, (4, 4))[0]
            patches = patchify(torch.from_numpy(image).permute(2, 0, 1)[None], 8)[0, keep]
            assert torch.equal(micro_batch["views"][name]["patches"][row], patches)
            assert micro_batch["views"][name]["positions"][row].tolist() == keep.tolist()


def test_workers_change_nothing(data):
    starts = range(0, 160, 16)  # across the end of the first epoch

    no_workers = list(make_batches(data, workers=0).iterate(starts, pin_memory=False))
    two_workers = list(make_batches(data, workers=2).iterate(starts, pin_memory=False))

    assert len(no_workers) == 10
    assert equal(no_workers, two_workers)


def test_a_share_of_the_shards_is_a_set_of_its_own(data):
    """A run on some of the shards sees only those, each sample once an epoch.

    It cannot resume a run on all shards.
    """
    selection = data / "train/{00000,00002}.tar"
    all_shards = make_batches(data)
    some_shards = make_batches(data, train=selection)

    seen = []
    for start in range(0, 80, 16):
        (micro_batch,) = some_shards[start]
        seen += some_shards.keys(micro_batch)

    expected = []
    for shard in (0, 2):
        expected += [(0, f"{shard:05d}.tar", f"{40 * shard + i:06d}") for i in range(40)]
    assert sorted(seen) == expected
    assert some_shards.fingerprint() != all_shards.fingerprint()
    assert some_shards.fingerprint() == make_batches(data, train=selection).fingerprint()


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_ranks_and_parts_share_the_same_batch(data, world_size, accumulate):
    (expected,) = make_batches(data)[112]  # contains samples of two epochs

    loaders = [
        make_batches(data, rank=rank, world_size=world_size, accumulate=accumulate)
        for rank in range(world_size)
    ]

    for loader in loaders:
        micro_batches = loader[112]
        assert len(micro_batches) == accumulate
        for micro_batch in micro_batches:
            assert len(micro_batch["samples"]) == 16 // world_size // accumulate
    assert equal(concatenate_ranks(loaders, 112), expected)


def make_batches_of_views(data, **options):
    return make_batches(data, views=SEVERAL_VIEWS, hidden=("view",), noise=("view",), **options)


def test_what_travels_of_several_views(data):
    (micro_batch,) = make_batches_of_views(data)[0]

    views = micro_batch["views"]
    always = {"patches", "positions", "box"}
    requested = {"hidden", "hidden_positions", "noise"}
    assert sorted(views) == ["teacher", "view1", "view2"], "each draw has its name"
    assert set(views["teacher"]) == always
    assert set(views["view1"]) == set(views["view2"]) == always | requested
    all_patches = [list(range(36))] * 16
    assert views["teacher"]["positions"].tolist() == all_patches, (
        "48 pixels are 6 x 6 patches, none of them hidden"
    )
    for key in views["view1"]:
        assert not torch.equal(views["view1"][key], views["view2"][key])
    (plain,) = make_batches(data)[0]
    assert all("box" not in view for view in plain["views"].values()), (
        "boxes are needed only if a view encloses others"
    )


def test_boxes_are_those_of_the_crops(data):
    loader = make_batches_of_views(data)

    (micro_batch,) = loader[0]

    boxes = {name: view["box"] for name, view in micro_batch["views"].items()}
    assert list(boxes) == ["teacher", "view1", "view2"]
    for box in boxes.values():
        assert box.shape == (16, 4)
        assert box.dtype == torch.float32

    for row, (epoch, i) in enumerate(micro_batch["samples"].tolist()):
        image = loader.shards[i].image
        for number, name in ((2, "view1"), (3, "view2")):
            rng = np.random.default_rng((3, epoch, i, number))
            _, expected = random_view(image, 32, SEVERAL_VIEWS["view"], rng)
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

    (micro_batch,) = make_batches(data, views=masked, hidden=("image",))[0]

    assert "hidden" not in micro_batch["views"]["local"], "only if the method uses it"
    image = micro_batch["views"]["image"]
    visible = parse_mask(mask).visible_count(16)
    assert image["hidden"].shape == (16, 16 - visible, 192)
    assert image["hidden"].dtype == torch.uint8
    assert image["hidden_positions"].dtype == torch.int16
    assert (image["hidden_positions"].diff(dim=1) > 0).all(), "ascending"

    # Both together are the view without its mask, in another order.
    patches = torch.cat([image["patches"], image["hidden"]], dim=1)
    positions = torch.cat([image["positions"], image["hidden_positions"]], dim=1)
    assert (positions.sort(dim=1).values == torch.arange(16)).all(), (
        "each patch is either visible or hidden"
    )
    (plain,) = make_batches(data, views=unmasked)[0]
    all_patches = plain["views"]["image"]["patches"]
    assert torch.equal(patches, all_patches.take_along_dim(positions.long()[:, :, None], dim=1))


def test_noise(data):
    (micro_batch,) = make_batches_of_views(data)[0]

    for name in ("view1", "view2"):
        noise = micro_batch["views"][name]["noise"]
        assert noise.shape == (16, 16)
        assert noise.dtype == torch.float32
        # Uniform in [0, 1), and different for each image.
        assert noise.min() >= 0
        assert noise.max() < 1
        assert abs(noise.mean() - 0.5) < 0.08
        assert noise.std() > 0.25
        assert len(noise.unique(dim=0)) == 16
        largest = noise.argsort(dim=1, descending=True)[:, :4]
        largest_positions = largest.sort(dim=1).values.short()
        assert not torch.equal(largest_positions, micro_batch["views"][name]["positions"][:, :4]), (
            "not the noise that the mask used"
        )
    (plain,) = make_batches(data)[0]
    assert all("noise" not in view for view in plain["views"].values())


@pytest.mark.parametrize("world_size, accumulate", [(1, 4), (2, 2), (4, 1)])
def test_ranks_and_parts_share_several_views(data, world_size, accumulate):
    (expected,) = make_batches_of_views(data)[112]

    loaders = [
        make_batches_of_views(data, rank=rank, world_size=world_size, accumulate=accumulate)
        for rank in range(world_size)
    ]

    assert equal(concatenate_ranks(loaders, 112), expected)


def test_workers_change_nothing_of_several_views(data):
    starts = range(96, 144, 16)

    no_workers = list(make_batches_of_views(data, workers=0).iterate(starts, pin_memory=False))
    two_workers = list(make_batches_of_views(data, workers=2).iterate(starts, pin_memory=False))

    assert len(no_workers) == 3
    assert equal(no_workers, two_workers)


@pytest.mark.parametrize("key", ["hidden", "noise"])
def test_an_enlarged_view_may_be_asked_for_more(data, key):
    teacher = replace(SEVERAL_VIEWS["teacher"], enlarge=True, mask="random(0.5)")
    views = {**SEVERAL_VIEWS, "teacher": teacher}

    (micro_batch,) = make_batches(data, views=views, **{key: ("teacher",)})[0]

    count = {"hidden": 18, "noise": 36}[key]  # of 36 patches
    assert micro_batch["views"]["teacher"][key].shape[:2] == (16, count)


def test_a_view_that_makes_no_patches_is_named(data):
    views = {**SEVERAL_VIEWS, "teacher": View(encloses=("view",), size=50)}

    with pytest.raises(
        ValueError,
        match="views.teacher: an image of 50 x 50 pixels does not divide into patches of 8",
    ):
        make_batches(data, views=views)


def test_a_batch_that_does_not_divide():
    with pytest.raises(ValueError, match="nearest: 12 or 18"):
        micro_batch_size(16, 3, 2)
    with pytest.raises(ValueError, match="nearest: 8"):
        micro_batch_size(6, 4, 2)


def test_a_batch_over_the_end_of_an_epoch(data):
    """Every sample occurs once in each epoch.

    That includes batches that contain the end of an epoch and the beginning of the next.
    """
    loader = make_batches(data)

    samples = torch.cat([loader[start][0]["samples"] for start in range(0, 240, 16)])

    expected = list(product((0, 1), range(120)))  # (epoch, sample)
    assert sorted(map(tuple, samples.tolist())) == expected
    epochs = loader[112][0]["samples"][:, 0]
    assert set(epochs.tolist()) == {0, 1}

    (huge,) = make_batches(data, batch=300)[0]
    counts = huge["samples"][:, 0].bincount()
    assert counts.tolist() == [120, 120, 60], "a batch larger than the data"


def test_crops_and_masks_change_with_the_epoch_and_nothing_else(data):
    sample = Shards([data / "train"])[5]

    def read_views(epoch, **options):
        return make_batches(data, **options).reader.prepare(sample, epoch, 5).views

    first, other, again = (read_views(epoch) for epoch in (0, 1, 0))

    for name in VIEWS:
        assert not np.array_equal(first[name]["positions"], other[name]["positions"]), (
            "the mask changes"
        )
        for key in first[name]:
            assert np.array_equal(first[name][key], again[name][key])

    unmasked = {name: replace(view, mask="none") for name, view in VIEWS.items()}
    crops = [read_views(epoch, views=unmasked)["image"]["patches"] for epoch in (0, 1)]
    assert not np.array_equal(*crops), "the crop changes"

    reordered = read_views(0, views=dict(reversed(VIEWS.items())))
    for name in VIEWS:
        for key in first[name]:
            assert np.array_equal(first[name][key], reordered[name][key]), (
                "the order in the config does not matter"
            )

    other_seed = read_views(0, seed=4)
    assert not np.array_equal(first["image"]["positions"], other_seed["image"]["positions"])


def write_broken_shard(folder, broken):
    """Write 24 pairs, of which `broken` have in turn a truncated image, no image or no caption."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(24):
        image = picture("red circle", rng, "jpg")
        files = {"jpg": image, "txt": f"number {i}".encode()}
        if i in broken:
            truncated = {**files, "jpg": image[:150]}
            files = (truncated, {"txt": b"x"}, {"jpg": image})[i % 3]
        rows.append((f"{i:03d}", files))
    folder.mkdir()
    write_shard(folder / "0.tar", rows)
    return folder


def test_a_broken_sample_is_replaced_named_and_alone(data, tmp_path):
    broken = (3, 7, 11)
    (good,) = make_batches(data, train=write_broken_shard(tmp_path / "good", ()))[0]
    folder = write_broken_shard(tmp_path / "bad", broken)

    loaders = [make_batches(data, train=folder, rank=rank, world_size=2) for rank in (0, 1)]
    micro_batch = concatenate_ranks(loaders, 0)

    broken_rows = [row for row, (_, i) in enumerate(good["samples"].tolist()) if i in broken]
    assert broken_rows, "the batch contains some of them"
    reported = {(shard, key) for shard, key, _ in micro_batch["bad"]}
    assert reported <= {("0.tar", "003"), ("0.tar", "007"), ("0.tar", "011")}
    for row, (epoch, i) in enumerate(good["samples"].tolist()):
        if row in broken_rows:
            assert ("0.tar", f"{i:03d}") in reported
            continue
        assert micro_batch["samples"][row].tolist() == [epoch, i]
        for name in VIEWS:
            patches = micro_batch["views"][name]["patches"][row]
            expected = good["views"][name]["patches"][row]
            assert torch.equal(patches, expected), "the other samples are unchanged"
    trained_on = {i for _, i in micro_batch["samples"].tolist()}
    assert not trained_on.intersection(broken), "`samples` lists the substitutes"

    one_rank = make_batches(data, train=folder)
    assert equal(one_rank[0][0], micro_batch), "the substitutes are the same on one rank"
    reasons = ""
    for start in range(0, 96, 16):
        for _, _, reason in one_rank[start][0]["bad"]:
            reasons += reason
    assert "no image: has txt" in reasons
    assert "no caption: has jpg" in reasons
    assert "cannot read the image" in reasons


def test_nothing_readable_ends_the_run(data, tmp_path):
    loader = make_batches(data, train=write_broken_shard(tmp_path / "bad", range(24)))

    with pytest.raises(
        ValueError,
        match=f"{MAX_SUBSTITUTES} samples in a row cannot be read, the last 0.tar"
        " .*prepare.py check",
    ):
        loader[0]


def test_keys(data):
    loader = make_batches(data)
    (micro_batch,) = loader[112]

    keys = loader.keys(micro_batch)

    for (epoch, i), key in zip(micro_batch["samples"].tolist(), keys, strict=True):
        sample = loader.shards[i]
        assert key == (epoch, sample.shard, sample.key)
        assert sample.shard == f"{int(sample.key) // 40:05d}.tar"


def test_pad_text(data):
    cfg = replace(make_batches(data).reader.cfg, pad_text=True)
    reader = SampleReader(cfg, VIEWS, image_size=32, patch=8, seed=0)
    (plain,) = make_batches(data, seed=0)[0]

    (micro_batch,) = Batches(reader, Shards(cfg.train), batch=16)[0]

    text = micro_batch["text"]
    assert text["lengths"].tolist() == [12] * 16
    assert text["longest"] == 12
    captions = plain["text"]["ids"].split(plain["text"]["lengths"].tolist())
    for row, ids in zip(text["ids"].view(16, 12), captions):
        padding = [reader.tokenizer.pad_id] * (12 - len(ids))
        assert row.tolist() == ids.tolist() + padding


def test_gray_and_palette_images_join_a_batch(data, tmp_path):
    rows = []
    for i, mode in enumerate(("L", "P", "RGBA", "I;16", "CMYK", "1")):
        out = io.BytesIO()
        Image.new(mode, (20, 33)).save(out, "TIFF" if mode == "CMYK" else "PNG")
        rows.append((f"{i}", {"png": out.getvalue(), "txt": b"x"}))
    write_shard(tmp_path / "0.tar", rows)

    (micro_batch,) = make_batches(data, train=tmp_path, batch=6)[0]

    assert micro_batch["bad"] == []
    assert micro_batch["views"]["image"]["patches"].shape == (6, 8, 192)
