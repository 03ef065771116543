"""run/embed.py: row i is the embedding of the i-th readable image, the same as in evaluations.

The rows are the same on any number of ranks, and after an interruption.

    bash run/test.sh tests/run/evals/test_embed.py

Fast tests run ranks as threads of this process, or the script as one process. The slow test
launches two ranks.
"""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pyarrow import parquet
from safetensors.torch import load_file, save_file

from glimpse.data.evals.clip_benchmark import ClipBenchmarkSet
from glimpse.data.evals.gallery import FolderGallery, ShardGallery, TextGallery, open_gallery
from glimpse.data.shards import write_shard
from glimpse.model import portable
from glimpse.model.lazy_tensors import LazyTensors
from glimpse.model.portable import ModelInfo, PortableModel
from glimpse.run.embed import main
from glimpse.run.evals import embeddings
from glimpse.run.evals.embed import Embedder
from glimpse.run.evals.embeddings import EmbeddingFolder, EmbeddingsInfo, write_embeddings
from glimpse.run.lib import distributed
from glimpse.tests.helpers.threads import ranks
from glimpse.tests.helpers.tiny import (
    NAMES,
    ROOT,
    environment,
    launch,
    picture,
    tiny_run_arguments,
    untrained_method,
    write_dataset,
)

PHOTOS = 47
BROKEN = (9, 30)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("embed"))


@pytest.fixture(scope="module")
def model(data):
    return build_embedder(*untrained_method(data / "tokenizer.model"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Write pictures into nested folders, two of them broken, and return the root.

    Two of three have a caption, in a txt or a json.
    """
    root = tmp_path_factory.mktemp("photos") / "photos"
    rng = np.random.default_rng(1)
    for i in range(PHOTOS):
        if i < 20:
            folder = root
        elif i < 30:
            folder = root / "more/below"
        else:
            folder = root / "b"
        folder.mkdir(parents=True, exist_ok=True)

        kind = ("jpg", "png", "bmp")[i % 3]
        path = folder / f"{i:02d}.{kind}"
        image = picture(NAMES[i % 24], rng, kind)
        if i == BROKEN[0]:
            image = image[: len(image) // 3]
        elif i == BROKEN[1]:
            image = b"no image"
        path.write_bytes(image)

        if i % 3 == 1:
            path.with_suffix(".txt").write_text(caption(i))
        elif i % 3 == 2:
            path.with_suffix(".json").write_text(json.dumps({"caption": [caption(i), "another"]}))
    return root


def caption(i):
    """Return the caption of picture i."""
    return f"a {NAMES[i % 24]} number {i}"


ORDER = [*range(20), *range(30, PHOTOS), *range(20, 30)]  # the root's, then b/, then more/
READABLE = [i for i in ORDER if i not in BROKEN]


def build_embedder(method, cfg, tokenizer):
    return Embedder(method, cfg, tokenizer, results_folder=Path("nowhere"), tag="test")


def embedding_folder(folder, gallery, **changes):
    info = dict(
        model="m",
        weights="student",
        checksum="0",
        source="s",
        count=len(gallery),
        last=gallery.name(len(gallery) - 1),
        format="npy",
        dtype="fp32",
        part=20,
    )
    return EmbeddingFolder(folder, EmbeddingsInfo(**info | changes))


def embed_gallery(
    monkeypatch, model, gallery, folder, world=1, batch=4, resume=False, **changes
) -> EmbeddingFolder:
    """Embed a gallery on `world` ranks, in parts of 20 images."""
    out = embedding_folder(folder, gallery, **changes)
    parts = out.start(resume)
    with ranks(monkeypatch, world, batch) as run:
        run(lambda: write_embeddings(model, gallery, out, parts, batch, 0))
    return out


def load_npy(folder, kind):
    """Return the rows of all parts."""
    return np.concatenate([np.load(path) for path in sorted(folder.glob(f"{kind}/*.npy"))])


def contents(folder):
    """Return {path: bytes} of all files in a folder."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize("world", [2, 3])
def test_any_number_of_ranks_writes_the_same_bytes(model, photos, tmp_path, monkeypatch, world):
    gallery = open_gallery(photos)
    file_counts = {"npy": 1 + 3 * 3 + 2, "parquet": 1 + 3 + 2}
    for kind, file_count in file_counts.items():
        single, several = tmp_path / f"{kind} 1", tmp_path / f"{kind} {world}"

        embed_gallery(monkeypatch, model, gallery, single, format=kind)
        embed_gallery(monkeypatch, model, gallery, several, world, format=kind)

        files = contents(single)
        assert contents(several) == files
        assert len(files) == file_count


def test_rows_are_the_readable_images_in_order(model, photos, tmp_path, monkeypatch):
    gallery = open_gallery(photos)
    assert isinstance(gallery, FolderGallery)
    assert gallery.captioned

    out = embed_gallery(monkeypatch, model, gallery, tmp_path / "out")

    # The table.
    table = parquet.read_table(tmp_path / "out/metadata").to_pydict()
    paths = [Path(name) for name in table["image_path"]]
    assert [int(path.stem) for path in paths] == READABLE
    assert all(path.is_file() for path in paths)
    assert table["caption"] == [caption(i) if i % 3 else None for i in READABLE]

    # The embeddings.
    images, texts = load_npy(tmp_path / "out", "img_emb"), load_npy(tmp_path / "out", "text_emb")
    shape = (PHOTOS - 2, model.cfg.model.shape.embed)
    assert images.dtype == np.float32
    assert images.shape == texts.shape == shape
    np.testing.assert_allclose(np.linalg.norm(images, axis=1), 1, rtol=1e-6)
    captioned = [row for row, i in enumerate(READABLE) if i % 3]
    with ranks(monkeypatch, 1, 4) as run:
        captions = [caption(READABLE[row]) for row in captioned]
        (expected,) = run(lambda: model.embed_texts(captions))
    np.testing.assert_allclose(texts[captioned], expected, atol=1e-6)
    uncaptioned = [row for row, i in enumerate(READABLE) if i % 3 == 0]
    assert not texts[uncaptioned].any(), "zeros without a caption"

    # The images left out.
    assert out.count_rows() == (PHOTOS - 2, 2)
    lines = []
    for path in sorted((tmp_path / "out/left_out").iterdir()):
        lines += path.read_text().splitlines()
    names = [line.split("\t")[0] for line in lines]
    assert [int(Path(name).stem) for name in names] == [9, 30]
    assert all("cannot read the image" in line for line in lines)


def test_embeddings_are_those_of_evaluations(data, model, tmp_path, monkeypatch):
    """The images of an evaluation set, and texts, are bitwise equal."""
    prompts = [caption(i) for i in range(49)]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n\n")
    gallery = open_gallery(data / "eval/shapes/test")
    assert isinstance(gallery, ShardGallery)
    assert not gallery.captioned, "its images have classes"

    embed_gallery(monkeypatch, model, gallery, tmp_path / "images", world=2)
    embed_gallery(
        monkeypatch, model, TextGallery(tmp_path / "prompts.txt"), tmp_path / "texts", world=3
    )
    with ranks(monkeypatch, 1, 4) as run:
        ((indices, images),) = run(
            lambda: model.embed_images(ClipBenchmarkSet(data / "eval/shapes"))
        )
        (texts,) = run(lambda: model.embed_texts(prompts))

    names = parquet.read_table(tmp_path / "images/metadata")["image_path"].to_pylist()
    assert names == [f"0.tar/{i:04d}" for i in range(49)]
    table = parquet.read_table(tmp_path / "texts/metadata").to_pydict()
    assert table == {"caption": prompts}
    assert indices.tolist() == list(range(49))
    np.testing.assert_array_equal(load_npy(tmp_path / "images", "img_emb"), images)
    np.testing.assert_array_equal(load_npy(tmp_path / "texts", "text_emb"), texts)
    folders = [path.name for path in tmp_path.glob("*/*_emb")]
    assert sorted(folders) == ["img_emb", "text_emb"]


def test_parquet_and_half_precision_hold_the_same(model, photos, tmp_path, monkeypatch):
    gallery = open_gallery(photos)

    embed_gallery(monkeypatch, model, gallery, tmp_path / "npy")
    embed_gallery(
        monkeypatch, model, gallery, tmp_path / "parquet", format="parquet", dtype="fp16", part=40
    )

    table = parquet.read_table(tmp_path / "parquet/parquet")
    metadata = parquet.read_table(tmp_path / "npy/metadata")
    assert table.select(["image_path", "caption"]).to_pydict() == metadata.to_pydict()
    for column in ("image_embedding", "text_embedding"):
        kind = str(table.schema.field(column).type)
        assert kind == "fixed_size_list<element: halffloat>[128]"
    images = np.stack(table["image_embedding"].to_numpy())
    np.testing.assert_array_equal(images, load_npy(tmp_path / "npy", "img_emb").astype(np.float16))
    for i, text in zip(READABLE, table["text_embedding"].to_pylist(), strict=True):
        assert (text is None) == (i % 3 == 0), "null without a caption"


def test_an_interrupted_job_can_be_resumed(model, photos, tmp_path, monkeypatch):
    gallery = open_gallery(photos)
    folder = tmp_path / "out"
    embed_gallery(monkeypatch, model, gallery, tmp_path / "uninterrupted")
    write_part = EmbeddingFolder.write_part

    def fail_at_part_1(self, part, rows):
        if part == 1:
            raise OSError("disk full")
        write_part(self, part, rows)

    with monkeypatch.context() as context, pytest.raises(OSError, match="disk full"):
        context.setattr(EmbeddingFolder, "write_part", fail_at_part_1)
        embed_gallery(context, model, gallery, folder)

    # Two parts are missing. They can only be added with the same model and options.
    assert embedding_folder(folder, gallery).start(resume=True) == [1, 2]
    with pytest.raises(ValueError, match=f"--out: {folder} exists; continue with --resume"):
        embedding_folder(folder, gallery).start(resume=False)
    with pytest.raises(
        ValueError, match="was started with dtype 'fp32', not 'fp16'; choose another --out"
    ):
        embedding_folder(folder, gallery, dtype="fp16").start(resume=True)
    with pytest.raises(
        ValueError, match="was started with model 'm', not 'n'; choose another --out"
    ):
        embedding_folder(folder, gallery, model="n").start(resume=True)

    embed_gallery(monkeypatch, model, gallery, folder, world=3, resume=True)
    assert contents(folder) == contents(tmp_path / "uninterrupted")
    embed_gallery(monkeypatch, model, gallery, folder, resume=True)  # no part is missing

    # A folder with other content is refused.
    (tmp_path / "other").mkdir()
    (tmp_path / "other/letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="has no embed.json"):
        embedding_folder(tmp_path / "other", gallery).start(resume=True)


def test_it_stops_if_most_images_are_broken(data, model, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    rows = []
    for i in range(10):
        image = picture(NAMES[i], rng) if i % 5 == 0 else b""
        rows.append((f"{i}", {"png": image, "txt": caption(i).encode()}))
    rows.append(("text", {"txt": b"no image"}))
    (tmp_path / "tars").mkdir()
    write_shard(tmp_path / "tars/0.tar", rows)
    gallery = open_gallery(tmp_path / "tars")
    out = tmp_path / "out"

    message = (
        r"s: 9 of 11 images cannot be read, the first 0.tar/1 \(cannot read .*\); repair the images"
        " or the storage and continue with --resume"
    )
    with pytest.raises(ValueError, match=message):
        embed_gallery(monkeypatch, model, gallery, out, world=2, batch=3)

    # With a higher limit the job continues without them.
    monkeypatch.setattr(embeddings, "MAX_BROKEN_SHARE", 0.9)
    embed_gallery(monkeypatch, model, gallery, out, world=2, batch=3, resume=True)
    table = parquet.read_table(out / "metadata").to_pydict()
    assert table == dict(image_path=["0.tar/0", "0.tar/5"], caption=[caption(0), caption(5)])
    left_out = (out / "left_out/left_out_00000.tsv").read_text()
    assert "0.tar/text\tno image: has txt" in left_out


def test_bad_galleries(data, tmp_path):
    (tmp_path / "deep/shards").mkdir(parents=True)
    (tmp_path / "deep/shards/0.tar").touch()
    (tmp_path / "gap.txt").write_text("a cat\n\na dog\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")

    with pytest.raises(ValueError, match="none: no such folder of images or shards"):
        open_gallery(tmp_path / "none")
    with pytest.raises(
        ValueError, match=f"no images below it .*; there are shards in {tmp_path}/deep/shards"
    ):
        open_gallery(tmp_path / "deep")
    with pytest.raises(ValueError, match="gap.txt: line 2 is empty"):
        TextGallery(tmp_path / "gap.txt")
    with pytest.raises(ValueError, match="latin.txt: not UTF-8"):
        TextGallery(tmp_path / "latin.txt")
    assert ShardGallery(data / "train").captioned


def test_ranks_that_see_other_images_raise_an_error(data, monkeypatch):
    """If one rank listed one more file, the rows of all others would be shifted."""
    gallery = open_gallery(data / "train")
    info = embedding_folder(Path("nowhere"), gallery).info

    with ranks(monkeypatch, 2, 4) as run:
        run(lambda: embeddings.check_ranks_agree(info))
        with pytest.raises(
            ValueError,
            match="s: this rank sees 121 entries, the last of them 00002.tar/000119; rank 0 sees"
            " others",
        ):
            run(
                lambda: embeddings.check_ranks_agree(
                    replace(info, count=info.count + distributed.rank())
                )
            )


def save_converted_model(data, folder):
    """Save an untrained model as run/convert.py does, and return its embedder."""
    method, cfg, tokenizer = untrained_method(data / "tokenizer.model")
    weights = {name: p.detach().clone() for name, p in method.towers.named_parameters()}
    about = ModelInfo(
        tokenizer=cfg.data.tokenizer, fingerprint=tokenizer.fingerprint, crop="resize_crop"
    )
    model = PortableModel(
        cfg.model, tokenizer.vocab_size, cfg.data.context, LazyTensors.from_dict(weights), about
    )
    portable.save_model(model, folder, torch.float32)
    return build_embedder(method, replace(cfg, eval_crop="resize_crop"), tokenizer)


def run_script(*args, cwd=ROOT):
    """Run run/embed.py as one process."""
    return subprocess.run(
        [sys.executable, ROOT / "run/embed.py", *args],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
    )


def test_the_script_with_a_converted_model(data, photos, tmp_path, monkeypatch):
    """Calls from another folder, with loader processes, and calls that are refused."""
    model = save_converted_model(data, tmp_path / "model")
    embed_gallery(monkeypatch, model, FolderGallery(photos), tmp_path / "expected", batch=8)
    args = ("model", photos, "--out", "out", "--workers", "2", "--batch", "8", "--part", "20")

    # 1. The script writes the same files as a call of the function.
    result = run_script(*args, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    for kind in ("img_emb", "text_emb", "metadata", "left_out"):
        assert contents(tmp_path / "out" / kind) == contents(tmp_path / "expected" / kind)

    # 2. The code that it prints can be run.
    first, left_out, _, load, nearest = result.stdout.splitlines()
    assert first == "out: 45 images, 128 numbers each in fp32, 3 parts"
    assert left_out.startswith("2 images could not be read")
    names = {"np": np, "pq": parquet}
    monkeypatch.chdir(tmp_path)
    exec(load.strip(), names)
    assert eval(nearest.strip(), names)[0] == str(photos / "00.jpg")

    # 3. A second call is refused, with an error of one line.
    result = run_script(*args, cwd=tmp_path)
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr, result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error")]
    assert errors == [
        "error: --out: out exists; continue with --resume, remove the folder, or choose another"
    ]

    # 4. Another model at the same path is refused.
    file = tmp_path / "model/model.safetensors"
    weights = load_file(file)
    save_file(weights | {"text.norm.weight": -weights["text.norm.weight"]}, file)
    result = run_script(*args, "--resume", cwd=tmp_path)
    assert result.returncode == 2, "another model at the same path"
    assert "error: --resume: out was started with checksum '" in result.stderr

    # 5. A model that lacks a weight is refused.
    del weights["vision.patch.weight"]
    save_file(weights, file)
    result = run_script(*args, "--resume", cwd=tmp_path)
    assert result.returncode == 2, result.stderr
    message = "model: has no weights for towers.vision.patch.weight; it holds another"
    assert message in result.stderr, result.stderr


@pytest.mark.parametrize(
    "args, message",
    [
        ("--batch 0 photos", "--batch: 0 is too small; use 1 or more"),
        ("", "a folder of images, or --texts"),
        ("photos --texts prompts.txt", "a folder of images, or --texts"),
        ("photos --workers -1", "--workers: -1 is too small; use 0 or more"),
    ],
)
def test_bad_arguments(args, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run/embed.py", "runs/x", "--out", "out", *args.split()])
    with pytest.raises(ValueError, match=message):
        main()


@pytest.mark.slow
def test_a_run_on_two_ranks_writes_the_bytes_of_one(data, photos, tmp_path):
    result = launch(1, "run/pretrain.py", *tiny_run_arguments(data, tmp_path / "run", "samples=32"))
    assert result.returncode == 0, result.stderr[-2000:]
    args = (str(tmp_path / "run"), str(photos), "--batch", "4", "--part", "20", "--out")

    single = run_script(*args, tmp_path / "1")
    assert single.returncode == 0, single.stdout[-2000:] + single.stderr[-2000:]
    two = launch(2, "run/embed.py", *args, str(tmp_path / "2"))
    assert two.returncode == 0, two.stdout[-2000:] + two.stderr[-2000:]

    files = contents(tmp_path / "1")
    assert contents(tmp_path / "2") == files
    assert len(files) == 12
