"""run/embed.py: row i is the i-th readable image, embedded as evaluations do it, on any number of
ranks; broken off it goes on.

    bash run/test.sh tests/run/evals/test_embed.py
Fast cases run ranks as threads of this process, or the script as one process; the slow one launches
it on two.
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

from glimpse.data.evals.clip_benchmark import Benchmark
from glimpse.data.evals.gallery import Photos, Tars, Texts, open_gallery
from glimpse.data.shards import write_shard
from glimpse.model import portable
from glimpse.model.lazy_tensors import Tensors
from glimpse.model.portable import About as Source
from glimpse.model.portable import Portable
from glimpse.run.embed import main
from glimpse.run.evals import embeddings as code
from glimpse.run.evals.embed import Embedder
from glimpse.run.evals.embeddings import About, Output, embeddings
from glimpse.tests.helpers.threads import ranks
from glimpse.tests.helpers.tiny import (
    NAMES,
    ROOT,
    environment,
    launch,
    picture,
    settings,
    untrained,
)
from glimpse.tests.helpers.tiny import shards as make_shards

PHOTOS, BROKEN = 47, (9, 30)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("embed"))


@pytest.fixture(scope="module")
def model(data):
    return embedder(*untrained(data / "tokenizer.model"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Pictures in nested folders, two of which are cut off; two of three have a caption, in a txt
    or a json.
    """
    root, rng = tmp_path_factory.mktemp("photos") / "photos", np.random.default_rng(1)
    for i in range(PHOTOS):
        path = (
            root
            / ("" if i < 20 else "more/below" if i < 30 else "b")
            / f"{i:02d}.{('jpg', 'png', 'bmp')[i % 3]}"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        image = picture(NAMES[i % 24], rng, path.suffix[1:])
        path.write_bytes(
            image[: len(image) // 3] if i == BROKEN[0] else b"no image" if i == BROKEN[1] else image
        )
        if i % 3:
            kind, text = (
                ("txt", said(i))
                if i % 3 == 1
                else ("json", json.dumps({"caption": [said(i), "another"]}))
            )
            path.with_suffix(f".{kind}").write_text(text)
    return root


def said(i):
    return f"a {NAMES[i % 24]} number {i}"


ORDER = [*range(20), *range(30, PHOTOS), *range(20, 30)]  # the folder's own, then b/, then more/
KEPT = [i for i in ORDER if i not in BROKEN]


def embedder(method, cfg, tokenizer):
    return Embedder(method, cfg, tokenizer, home=Path("nowhere"), tag="test")


def output(folder, gallery, **how):
    given = (
        dict(
            model="m",
            weights="student",
            checksum="0",
            source="s",
            format="npy",
            dtype="fp32",
            part=20,
        )
        | how
    )
    return Output(folder, About(count=len(gallery), last=gallery.name(len(gallery) - 1), **given))


def made(monkeypatch, model, gallery, folder, world=1, batch=4, resume=False, **how):
    """The folder, written by `world` ranks; parts of 20 images."""
    out = output(folder, gallery, **how)
    todo = out.begin(resume)
    with ranks(monkeypatch, world, batch) as run:
        run(lambda: embeddings(model, gallery, out, todo, batch, 0))
    return out


def npy(folder, kind):
    return np.concatenate([np.load(path) for path in sorted(folder.glob(f"{kind}/*.npy"))])


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("world", [2, 3])
def test_any_number_of_ranks_writes_the_same_bytes(model, photos, tmp_path, monkeypatch, world):
    gallery = open_gallery(photos)
    for format in ("npy", "parquet"):
        made(monkeypatch, model, gallery, tmp_path / f"{format} 1", format=format)
        made(monkeypatch, model, gallery, tmp_path / f"{format} {world}", world, format=format)
        alone = contents(tmp_path / f"{format} 1")
        assert (
            contents(tmp_path / f"{format} {world}") == alone
            and len(alone) == {"npy": 1 + 3 * 3 + 2, "parquet": 1 + 3 + 2}[format]
        )


def test_rows_are_the_readable_images_in_order(model, photos, tmp_path, monkeypatch):
    gallery = open_gallery(photos)
    assert isinstance(gallery, Photos) and gallery.captioned
    out = made(monkeypatch, model, gallery, tmp_path / "out")
    table = parquet.read_table(tmp_path / "out/metadata").to_pydict()
    assert [int(Path(name).stem) for name in table["image_path"]] == KEPT and all(
        Path(name).is_file() for name in table["image_path"]
    )
    assert table["caption"] == [said(i) if i % 3 else None for i in KEPT]
    images, texts = npy(tmp_path / "out", "img_emb"), npy(tmp_path / "out", "text_emb")
    assert images.dtype == np.float32 and images.shape == texts.shape == (
        PHOTOS - 2,
        model.cfg.model.shape.embed,
    )
    np.testing.assert_allclose(np.linalg.norm(images, axis=1), 1, rtol=1e-6)
    has = [row for row, i in enumerate(KEPT) if i % 3]
    with ranks(monkeypatch, 1, 4) as run:
        wanted = run(lambda: model.texts([said(KEPT[row]) for row in has]))[0]
    np.testing.assert_allclose(texts[has], wanted, atol=1e-6)
    assert not texts[[row for row, i in enumerate(KEPT) if i % 3 == 0]].any(), (
        "zeros where there is no caption"
    )
    assert out.written() == (PHOTOS - 2, 2)
    lines = [
        line
        for path in sorted((tmp_path / "out/left_out").iterdir())
        for line in path.read_text().splitlines()
    ]
    assert [int(Path(line.split("\t")[0]).stem) for line in lines] == [9, 30] and all(
        "cannot read the image" in line for line in lines
    )


def test_they_are_the_embeddings_of_evaluations(data, model, tmp_path, monkeypatch):
    """Bit for bit: the images of an evaluation set, and texts."""
    gallery = open_gallery(data / "eval/shapes/test")
    assert isinstance(gallery, Tars) and not gallery.captioned, "it has classes"
    made(monkeypatch, model, gallery, tmp_path / "images", world=2)
    assert parquet.read_table(tmp_path / "images/metadata")["image_path"].to_pylist() == [
        f"0.tar/{i:04d}" for i in range(49)
    ]
    (tmp_path / "prompts.txt").write_text("\n".join(map(said, range(49))) + "\n\n")
    made(monkeypatch, model, Texts(tmp_path / "prompts.txt"), tmp_path / "texts", world=3)
    assert parquet.read_table(tmp_path / "texts/metadata").to_pydict() == {
        "caption": [said(i) for i in range(49)]
    }
    with ranks(monkeypatch, 1, 4) as run:
        ((indices, images),) = run(lambda: model.images(Benchmark(data / "eval/shapes")))
        (texts,) = run(lambda: model.texts([said(i) for i in range(49)]))
    assert indices.tolist() == list(range(49))
    np.testing.assert_array_equal(npy(tmp_path / "images", "img_emb"), images)
    np.testing.assert_array_equal(npy(tmp_path / "texts", "text_emb"), texts)
    assert {path.name for path in tmp_path.glob("*/*_emb")} == {"img_emb", "text_emb"} and len(
        list(tmp_path.glob("*/*_emb"))
    ) == 2


def test_parquet_and_half_precision_hold_the_same(model, photos, tmp_path, monkeypatch):
    gallery = open_gallery(photos)
    made(monkeypatch, model, gallery, tmp_path / "npy")
    made(monkeypatch, model, gallery, tmp_path / "parquet", format="parquet", dtype="fp16", part=40)
    table = parquet.read_table(tmp_path / "parquet/parquet")
    assert (
        table.select(["image_path", "caption"]).to_pydict()
        == parquet.read_table(tmp_path / "npy/metadata").to_pydict()
    )
    assert {str(table.schema.field(f"{what}_embedding").type) for what in ("image", "text")} == {
        "fixed_size_list<element: halffloat>[128]"
    }
    images = np.stack(table["image_embedding"].to_numpy())
    np.testing.assert_array_equal(images, npy(tmp_path / "npy", "img_emb").astype(np.float16))
    assert [row is None for row in table["text_embedding"].to_pylist()] == [
        i % 3 == 0 for i in KEPT
    ], "null where there is no caption"


def test_broken_off_it_goes_on(model, photos, tmp_path, monkeypatch):
    gallery, folder = open_gallery(photos), tmp_path / "out"
    made(monkeypatch, model, gallery, tmp_path / "whole")
    write = Output.write

    def breaks(self, part, rows):
        if part == 1:
            raise OSError("disk full")
        write(self, part, rows)

    with monkeypatch.context() as broken, pytest.raises(OSError, match="disk full"):
        broken.setattr(Output, "write", breaks)
        made(broken, model, gallery, folder)
    assert output(folder, gallery).begin(resume=True) == [1, 2]
    with pytest.raises(ValueError, match=f"--out: {folder} exists; go on with it by --resume"):
        output(folder, gallery).begin(resume=False)
    for key, value, said in (
        ("dtype", "fp16", "dtype 'fp32', not 'fp16'"),
        ("model", "n", "model 'm', not 'n'"),
    ):
        with pytest.raises(ValueError, match=f"begun with {said}; name another --out"):
            output(folder, gallery, **{key: value}).begin(resume=True)
    made(monkeypatch, model, gallery, folder, world=3, resume=True)
    assert contents(folder) == contents(tmp_path / "whole")
    made(monkeypatch, model, gallery, folder, resume=True)  # nothing is left to do
    (tmp_path / "other").mkdir()
    (tmp_path / "other/letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="has no embed.json"):
        output(tmp_path / "other", gallery).begin(resume=True)


def test_where_most_images_are_broken_it_stops(data, model, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    rows = [
        (f"{i}", {"png": picture(NAMES[i], rng) if i % 5 == 0 else b"", "txt": said(i).encode()})
        for i in range(10)
    ]
    (tmp_path / "tars").mkdir()
    write_shard(tmp_path / "tars/0.tar", [*rows, ("text", {"txt": b"alone"})])
    with pytest.raises(
        ValueError,
        match=(
            r"s: 9 of 11 images cannot be read, the first 0.tar/1 \(cannot read .*; --resume"
            r" goes on"
        ),
    ):
        made(
            monkeypatch, model, open_gallery(tmp_path / "tars"), tmp_path / "out", world=2, batch=3
        )
    monkeypatch.setattr(code, "BROKEN", 0.9)
    made(
        monkeypatch,
        model,
        open_gallery(tmp_path / "tars"),
        tmp_path / "out",
        world=2,
        batch=3,
        resume=True,
    )
    table = parquet.read_table(tmp_path / "out/metadata").to_pydict()
    assert table == dict(image_path=["0.tar/0", "0.tar/5"], caption=[said(0), said(5)])
    assert (
        "0.tar/text\tno image: has txt"
        in (tmp_path / "out/left_out/left_out_00000.tsv").read_text()
    )


def test_what_is_no_gallery(data, tmp_path):
    (tmp_path / "deep/shards").mkdir(parents=True)
    (tmp_path / "deep/shards/0.tar").touch()
    (tmp_path / "gap.txt").write_text("a cat\n\na dog\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    for make, words in (
        (lambda: open_gallery(tmp_path / "none"), "none: no such folder of images or shards"),
        (
            lambda: open_gallery(tmp_path / "deep"),
            f"no images below it .*; there are shards in {tmp_path}/deep/shards",
        ),
        (lambda: Texts(tmp_path / "gap.txt"), "gap.txt: line 2 is empty"),
        (lambda: Texts(tmp_path / "latin.txt"), "latin.txt: not UTF-8"),
    ):
        with pytest.raises(ValueError, match=words):
            make()
    assert Tars(data / "train").captioned


def test_ranks_that_see_other_images_are_told(data, monkeypatch):
    """A rank that listed one file more would shift the rows of all others."""
    gallery = open_gallery(data / "train")
    about = output(Path("nowhere"), gallery).about
    with ranks(monkeypatch, 2, 4) as run:
        run(lambda: code.agree(about))
        with pytest.raises(
            ValueError, match="s: 121 here, the last 00002.tar/000119; rank 0 sees others"
        ):
            run(lambda: code.agree(replace(about, count=about.count + code.rank())))


def converted(data, folder):
    """An untrained model in the folder, as run/convert.py writes it."""
    method, cfg, tokenizer = untrained(data / "tokenizer.model")
    tensors = Tensors.held(
        {name: p.detach().clone() for name, p in method.towers.named_parameters()}
    )
    about = Source(
        tokenizer=cfg.data.tokenizer, fingerprint=tokenizer.fingerprint, crop="resize_crop"
    )
    portable.save(
        Portable(cfg.model, tokenizer.vocab_size, cfg.data.context, tensors, about),
        folder,
        torch.float32,
    )
    return embedder(method, replace(cfg, eval_crop="resize_crop"), tokenizer)


def script(*args, cwd=ROOT):
    return subprocess.run(
        [sys.executable, ROOT / "run/embed.py", *args],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
    )


def test_the_script_with_a_converted_model(data, photos, tmp_path, monkeypatch):
    """From another folder, with loader processes; what it prints is run; then it is refused in a
    line.
    """
    model = converted(data, tmp_path / "model")
    made(monkeypatch, model, Photos(photos), tmp_path / "wanted", batch=8)
    args = ("model", photos, "--out", "out", "--workers", "2", "--batch", "8", "--part", "20")
    done = script(*args, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    for kind in ("img_emb", "text_emb", "metadata", "left_out"):
        assert contents(tmp_path / "out" / kind) == contents(tmp_path / "wanted" / kind)
    first, left_out, _, load, nearest = done.stdout.splitlines()
    assert first == "out: 45 images, 128 numbers each in fp32, 3 parts" and left_out.startswith(
        "2 images could not be read"
    )
    known = {"np": np, "pq": parquet}
    monkeypatch.chdir(tmp_path)
    exec(load.strip(), known)
    assert eval(nearest.strip(), known)[0] == str(photos / "00.jpg")
    done = script(*args, cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("error")] == [
        "error: --out: out exists; go on with it by --resume, remove it, or name another"
    ]
    weights = load_file(tmp_path / "model/model.safetensors")
    save_file(
        weights | {"text.norm.weight": -weights["text.norm.weight"]},
        tmp_path / "model/model.safetensors",
    )
    done = script(*args, "--resume", cwd=tmp_path)
    assert (
        done.returncode == 2 and "error: --resume: out was begun with checksum '" in done.stderr
    ), "another model at the same path"
    del weights["vision.patch.weight"]
    save_file(weights, tmp_path / "model/model.safetensors")
    done = script(*args, "--resume", cwd=tmp_path)
    assert (
        done.returncode == 2
        and "model: has no weights for towers.vision.patch.weight; it holds another" in done.stderr
    ), done.stderr


@pytest.mark.parametrize(
    "args, words",
    [
        ("--batch 0 photos", "--batch 0: it must be at least 1"),
        ("", "a folder of images, or --texts"),
        ("photos --texts prompts.txt", "a folder of images, or --texts"),
        ("photos --workers -1", "--workers -1: it must be at least 0"),
    ],
)
def test_arguments_that_cannot_be(args, words, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run/embed.py", "runs/x", "--out", "out", *args.split()])
    with pytest.raises(ValueError, match=words):
        main()


@pytest.mark.slow
def test_a_run_on_two_ranks_writes_the_bytes_of_one(data, photos, tmp_path):
    done = launch(1, "run/pretrain.py", *settings(data, tmp_path / "run", "samples=32"))
    assert done.returncode == 0, done.stderr[-2000:]
    args = (str(tmp_path / "run"), str(photos), "--batch", "4", "--part", "20", "--out")
    for done in (
        script(*args, tmp_path / "1"),
        launch(2, "run/embed.py", *args, str(tmp_path / "2")),
    ):
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert (
        contents(tmp_path / "1") == contents(tmp_path / "2") and len(contents(tmp_path / "1")) == 12
    )
