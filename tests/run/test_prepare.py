"""run/prepare.py: each command does its work from its command line and says what is next.

Bad input is told in a line, with exit 2.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from glimpse.data.shards import Shards, write_shard
from glimpse.data.tokenizer import build_tokenizer
from glimpse.run import prepare
from glimpse.run.lib.cli import run_script
from glimpse.tests.helpers import tiny


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.write_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture
def train(data, tmp_path):
    """A folder of three shards that a test may change."""
    return Path(shutil.copytree(data / "train", tmp_path / "train"))


@pytest.fixture
def command(monkeypatch, capsys):
    """command("index", DIR) -> (exit code, stdout, stderr)"""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["prepare.py", *map(str, args)])
        with pytest.raises(SystemExit) as ended:
            run_script(prepare.main)
        out, err = capsys.readouterr()
        return ended.value.code or 0, out, err

    return run


def test_pairs_started_as_a_file_from_elsewhere(data, tmp_path):
    shards = Shards([data / "train"])
    for i in range(3):
        extension = list(shards[i].files)[0]
        (tmp_path / f"{i}.{extension}").write_bytes(shards[i].image)
        (tmp_path / f"{i}.txt").write_text(shards[i].caption)
    (tmp_path / "9.png").write_bytes(shards[0].image)

    arguments = ["pairs", ".", "--out", "out", "--per-shard", "2"]
    done = subprocess.run(
        [sys.executable, prepare.__file__, *arguments],
        cwd=tmp_path,
        env=tiny.environment(),
        capture_output=True,
        text=True,
    )

    assert done.returncode == 0
    assert done.stderr == ""
    assert done.stdout.startswith("out: 3 samples in 2 shards, ")
    assert "skipped 1 row: 1 no caption file beside it" in done.stdout
    assert "  9.png: no caption file" in done.stdout
    assert "next: python run/prepare.py check out" in done.stdout
    written = Shards([tmp_path / "out"])
    for i in range(3):
        assert written[i].image == shards[i].image
        assert written[i].caption == shards[i].caption


def test_index(command, train):
    for path in (train / "shards.index").iterdir():
        path.unlink()
    (train / "shards.index.json").unlink()

    code, out, _err = command("index", train)

    assert code == 0
    assert out.startswith(f"{train}: 120 samples in 3 shards, ")
    assert "(jpg 40, png 40, txt 120, webp 40)" in out
    assert f"next: python run/prepare.py check {train}" in out
    assert (train / "shards.index.json").exists()
    assert len(Shards([train])) == 120


def test_index_names_every_broken_shard(command, train):
    (train / "shards.index.json").unlink()
    (train / "00000.tar").write_bytes((train / "00000.tar").read_bytes()[:5000])
    (train / "00002.tar").write_bytes(b"<html>not found</html>")
    write_shard(train / "00003.tar", [])

    code, _out, err = command("index", train)

    assert code == 2
    assert err.startswith(f"error: {train}: 3 of 4 shards are ")
    assert not (train / "shards.index.json").exists()
    paths = [line.split(": ")[0] for line in err.splitlines()[1:]]
    names = [path.split("/")[-1] for path in paths]
    assert names == ["00000.tar", "00002.tar", "00003.tar"]


def test_index_names_every_shard_without_pairs(command, train):
    write_shard(train / "00000.tar", [("a", {"txt": b"x"})])
    write_shard(train / "00002.tar", [("a", {"jpg": b"x"})])

    code, _out, err = command("index", train)

    assert code == 2
    assert "2 shards cannot be trained on" in err
    assert "00000.tar: no images" in err
    assert "00002.tar: no captions" in err


def test_check_exits_by_what_it_found(command, train):
    code, out, err = command("check", train, "--ranks", "2", "--workers", "3")

    assert (code, err) == (0, "")
    assert "6 (ranks x workers)" in out
    assert out.endswith(f"ready: train with --set data.train={train}\n")

    # Two of 122 images that cannot be read are more than 1 %.
    rows = [(key, {"jpg": b"", "txt": b"x"}) for key in "01"]
    write_shard(train / "00003.tar", rows)
    assert command("index", train)[0] == 0
    code, out, err = command("check", train)

    assert (code, err) == (1, "")
    assert "not ready: 1.64% of the samples" in out
    assert "00003.tar  1  cannot read the image" in out


def test_tokenizer(command, train, tmp_path):
    caption = Shards([train])[0].caption
    out = tmp_path / "new" / "captions.model"

    code, said, err = command("tokenizer", train, "--out", out, "--vocab-size", "320")

    tokenizer = build_tokenizer(f"sentencepiece({out})", 16)
    assert (code, err) == (0, "")
    assert f"{out}: {tokenizer.vocab_size} pieces" in said
    assert f"--set 'data.tokenizer=sentencepiece({out})'" in said
    assert tokenizer.decode(tokenizer(caption)) == caption

    # More pieces than the captions hold.
    again = tmp_path / "again.model"
    _code, said, _err = command("tokenizer", train, "--out", again, "--vocab-size", "5000")
    assert "not 5,000" in said

    # A file that exists.
    code, _said, err = command("tokenizer", train, "--out", out)
    assert code == 2
    assert f"--out: {out} exists" in err

    # Fewer pieces than the captions have characters.
    small = tmp_path / "small.model"
    code, _said, err = command("tokenizer", train, "--out", small, "--vocab-size", "30")
    assert code == 2
    assert err.startswith("error: no tokenizer of 30 pieces")
    assert not small.exists()


def test_captions_for_a_tokenizer_are_every_nth_and_only_readable_ones(train):
    broken = [
        ("a", {"jpg": b"x", "json": b"[]"}),
        ("b", {"json": b'{"caption": "half \\ud83d"}'}),
        ("c", {"txt": b"last"}),
    ]
    write_shard(train / "00000.tar", broken)
    index = prepare.build_index(train)

    every = list(prepare.captions(train, index["shards"], 1))
    assert every[:2] == ["half \ufffd", "last"]

    # The 80 samples of the other two shards, each shard from its first.
    shards = Shards([train])
    some = list(prepare.captions(train, index["shards"][1:], 15))
    assert some == [shards[3 + i].caption for i in (0, 15, 30, 40, 55, 70)]


def test_glyphs(command, tmp_path, monkeypatch):
    """The build itself is tests/data/builders/test_glyphs.py's.

    Here: what it is asked for, and what a person reads.
    """
    calls = []

    def build(out, **settings):
        calls.append((out, settings))
        return dict(
            pairs=dict(train=12000, heldout=900),
            styles=dict(noto=dict(train=12000, heldout=100), fluent3d=dict(heldout=800)),
            eval=dict(seen=dict(images=7, classes=7), retrieval=dict(images=10)),
        )

    monkeypatch.setattr(prepare, "build", build)
    folder = tmp_path / "g"
    cache = tmp_path / "c"

    _code, out, _err = command("glyphs", "--out", folder, "--tones", "--icons", "--cache", cache)

    assert calls == [(folder, dict(cache=cache, tones=True, extras=False, icons=True))]
    assert "12,000 pairs in 1 styles: noto" in out
    assert "7 images, 7 classes" in out
    following = f"tokenizer {folder}/train --out {folder}-tokenizer.model"
    assert f"next: python run/prepare.py {following}" in out


def test_composites(command, tmp_path, monkeypatch):
    """As above: the build is tests/data/builders/test_composites.py's."""
    calls = []

    def build(out, **settings):
        calls.append((out, settings))
        return dict(
            settings=dict(concepts=dict(cat="cat", car="automobile"), scenes=[5000, 20, 10]),
            drawings=dict(
                train=dict(cat=4, car=5), test=dict(cat=2, car=2), unseen=dict(cat=1, car=2)
            ),
        )

    monkeypatch.setattr(prepare.composed, "build", build)
    folder = tmp_path / "c"

    code, out, _err = command(
        "composites", "--out", folder, "--train", "5000", "--test", "20", "--seed", "3"
    )

    glyphs = Path("datasets/glyphs")
    assert calls == [(folder, dict(glyphs=glyphs, train=5000, test=20, unseen=1000, seed=3))]
    assert code == 0
    assert f"{folder}: 2 classes" in out
    assert "train/            5,000 scenes of    9 drawings" in out
    assert f"next: python run/prepare.py check {folder}/train" in out


def test_bad_input_is_one_line_and_exit_2(command, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for args, expected in (
        (("index", tmp_path / "gone"), "no such folder"),
        (("index", tmp_path / "empty"), "no *.tar in it"),
        (("index", tmp_path / "file"), "no such folder"),
        (("check", tmp_path / "empty"), "no *.tar in it"),
        (("check", tmp_path / "empty", "--ranks", "0"), "--ranks: 0"),
        (("check", tmp_path / "gone"), "no such folder"),
        (("tokenizer", tmp_path / "empty", "--out", tmp_path / "m"), "no *.tar in it"),
        (("pairs", tmp_path / "empty", "--out", tmp_path / "o"), "no images below it"),
        (("pairs", tmp_path / "gone", "--out", tmp_path / "o"), "no such file or folder"),
        (("pairs", tmp_path / "file", "--out", tmp_path / "o"), "not a source"),
    ):
        code, out, err = command(*args)

        assert code == 2, args
        assert out == "", args
        assert err.startswith("error: "), args
        assert expected in err, args
        assert len(err.splitlines()) == 1, args
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "file"]


def test_an_unknown_command_lists_the_known_ones(command):
    code, _out, err = command("glyfs")

    assert code == 2
    for name in ("glyphs", "pairs", "index", "check", "tokenizer"):
        assert name in err
    for name in ("pairs", "tokenizer"):
        assert command(name, "--help")[0] == 0


def test_run_script_ends_with_the_code_and_one_line(capsys):
    def fail(error):
        def main():
            raise error

        return main

    def returning(code):
        return lambda: code

    for main, code, said in (
        (returning(None), None, ""),
        (returning(1), 1, ""),
        (fail(ValueError("mend me")), 2, "error: mend me\n"),
        (fail(PermissionError(13, "Permission denied", "/x")), 2, "error: /x: Permission denied\n"),
        (fail(KeyboardInterrupt()), 130, "interrupted\n"),
    ):
        with pytest.raises(SystemExit) as ended:
            run_script(main)

        assert ended.value.code == code
        assert capsys.readouterr().err == said

    with pytest.raises(TypeError):  # a mistake of ours keeps its traceback
        run_script(fail(TypeError("bug")))
