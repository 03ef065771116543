"""run/prepare.py: each command does its work from its command line and says what is next; bad input
is told in a line, with exit 2.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from glimpse.data.shards import Shards, write_shard
from glimpse.data.tokenizer import build
from glimpse.run import prepare
from glimpse.run.lib.cli import run_script
from glimpse.tests.helpers import tiny


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tiny.shards(tmp_path_factory.mktemp("made"))


@pytest.fixture
def train(made, tmp_path):
    return Path(shutil.copytree(made / "train", tmp_path / "train"))


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


def test_pairs_started_as_a_file_from_elsewhere(made, tmp_path):
    shards = Shards([made / "train"])
    for i in range(3):
        (tmp_path / f"{i}.{list(shards[i].parts)[0]}").write_bytes(shards[i].image)
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
    assert (done.returncode, done.stderr) == (0, "")
    assert (
        done.stdout.splitlines()[0].startswith("out: 3 samples in 2 shards, ")
        and "next: python run/prepare.py check out" in done.stdout
    )
    assert (
        "skipped 1 row: 1 no caption file beside it" in done.stdout
        and "  9.png: no caption file" in done.stdout
    )
    written = Shards([tmp_path / "out"])
    assert [(written[i].image, written[i].caption) for i in range(3)] == [
        (shards[i].image, shards[i].caption) for i in range(3)
    ]


def test_index(command, train):
    for path in (train / "shards.index").iterdir():
        path.unlink()
    (train / "shards.index.json").unlink()
    code, out, err = command("index", train)
    assert (
        code == 0
        and out.startswith(f"{train}: 120 samples in 3 shards, ")
        and "(jpg 40, png 40, txt 120, webp 40)" in out
    )
    assert (
        f"next: python run/prepare.py check {train}" in out
        and (train / "shards.index.json").exists()
        and len(Shards([train])) == 120
    )


def test_index_names_every_broken_shard(command, train):
    (train / "shards.index.json").unlink()
    (train / "00000.tar").write_bytes((train / "00000.tar").read_bytes()[:5000])
    (train / "00002.tar").write_bytes(b"<html>not found</html>")
    write_shard(train / "00003.tar", [])
    code, out, err = command("index", train)
    assert (
        code == 2
        and err.startswith(f"error: {train}: 3 of 4 shards are ")
        and not (train / "shards.index.json").exists()
    )
    assert [line.split(": ")[0].split("/")[-1] for line in err.splitlines()[1:]] == [
        "00000.tar",
        "00002.tar",
        "00003.tar",
    ]


def test_index_names_every_shard_without_pairs(command, train):
    write_shard(train / "00000.tar", [("a", {"txt": b"x"})])
    write_shard(train / "00002.tar", [("a", {"jpg": b"x"})])
    code, out, err = command("index", train)
    assert (
        code == 2
        and "2 shards cannot be trained on" in err
        and "00000.tar: no images" in err
        and "00002.tar: no captions" in err
    )


def test_check_exits_by_what_it_found(command, train):
    code, out, err = command("check", train, "--ranks", "2", "--workers", "3")
    assert (
        (code, err) == (0, "")
        and "6 (ranks x workers)" in out
        and out.endswith(f"ready: train with --set data.train={train}\n")
    )
    write_shard(train / "00003.tar", [(str(i), {"jpg": b"", "txt": b"x"}) for i in range(2)])
    assert command("index", train)[0] == 0
    code, out, err = command("check", train)
    assert (
        (code, err) == (1, "")
        and "not ready: 1.64% of the samples" in out
        and "00003.tar  1  cannot read the image" in out
    )


def test_tokenizer(command, train, tmp_path):
    shards = Shards([train])
    out = tmp_path / "new" / "captions.model"
    code, said, err = command("tokenizer", train, "--out", out, "--vocab-size", "320")
    tokenizer = build(f"sentencepiece({out})", 16)
    assert (code, err) == (0, "") and f"{out}: {tokenizer.vocab_size} pieces" in said
    assert f"--set 'data.tokenizer=sentencepiece({out})'" in said
    assert tokenizer.decode(tokenizer(shards[0].caption)) == shards[0].caption
    again = tmp_path / "again.model"
    assert "not 5,000" in command("tokenizer", train, "--out", again, "--vocab-size", "5000")[1]
    code, said, err = command("tokenizer", train, "--out", out)
    assert code == 2 and f"--out: {out} exists" in err
    code, said, err = command(
        "tokenizer", train, "--out", tmp_path / "small.model", "--vocab-size", "30"
    )
    assert (
        code == 2
        and err.startswith("error: no tokenizer of 30 pieces")
        and not (tmp_path / "small.model").exists()
    )


def test_captions_for_a_tokenizer_are_every_nth_and_only_readable_ones(train):
    broken = [
        ("a", {"jpg": b"x", "json": b"[]"}),
        ("b", {"json": b'{"caption": "half \\ud83d"}'}),
        ("c", {"txt": b"last"}),
    ]
    write_shard(train / "00000.tar", broken)
    index = prepare.build_index(train)
    assert list(prepare.captions(train, index["shards"], 1))[:2] == ["half \ufffd", "last"]
    shards = Shards([train])
    assert list(prepare.captions(train, index["shards"][1:], 15)) == [
        shards[3 + i].caption for i in (0, 15, 30, 40, 55, 70)
    ]


def test_glyphs(command, tmp_path, monkeypatch):
    """The build itself is tests/data/builders/test_glyphs.py's; here: what it is asked for, and
    what a person
    reads.
    """
    asked = []

    def build(out, **settings):
        asked.append((out, settings))
        return dict(
            pairs=dict(train=12000, heldout=900),
            styles=dict(noto=dict(train=12000, heldout=100), fluent3d=dict(heldout=800)),
            eval=dict(seen=dict(images=7, classes=7), retrieval=dict(images=10)),
        )

    monkeypatch.setattr(prepare, "build", build)
    code, out, err = command(
        "glyphs", "--out", tmp_path / "g", "--tones", "--icons", "--cache", tmp_path / "c"
    )
    assert asked == [
        (tmp_path / "g", dict(cache=tmp_path / "c", tones=True, extras=False, icons=True))
    ]
    assert "12,000 pairs in 1 styles: noto" in out and "7 images, 7 classes" in out
    assert (
        f"next: python run/prepare.py tokenizer {tmp_path}/g/train --out"
        f" {tmp_path}/g-tokenizer.model" in out
    )


def test_composites(command, tmp_path, monkeypatch):
    """As above: the build is tests/data/builders/test_composites.py's."""
    asked = []

    def build(out, **settings):
        asked.append((out, settings))
        return dict(
            settings=dict(concepts=dict(cat="cat", car="automobile"), scenes=[5000, 20, 10]),
            drawings=dict(
                train=dict(cat=4, car=5), test=dict(cat=2, car=2), unseen=dict(cat=1, car=2)
            ),
        )

    monkeypatch.setattr(prepare.composed, "build", build)
    code, out, err = command(
        "composites", "--out", tmp_path / "c", "--train", "5000", "--test", "20", "--seed", "3"
    )
    assert asked == [
        (
            tmp_path / "c",
            dict(glyphs=Path("datasets/glyphs"), train=5000, test=20, unseen=1000, seed=3),
        )
    ]
    assert (
        code == 0
        and f"{tmp_path}/c: 2 classes" in out
        and "train/            5,000 scenes of    9 drawings" in out
    )
    assert f"next: python run/prepare.py check {tmp_path}/c/train" in out


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
        assert (
            code == 2
            and out == ""
            and err.startswith("error: ")
            and expected in err
            and len(err.splitlines()) == 1
        ), (args, err)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "file"]


def test_an_unknown_command_lists_the_known_ones(command):
    code, out, err = command("glyfs")
    assert code == 2 and all(
        name in err for name in ("glyphs", "pairs", "index", "check", "tokenizer")
    )
    for name in ("pairs", "tokenizer"):
        assert command(name, "--help")[0] == 0


def test_run_script_ends_with_the_code_and_one_line(capsys):
    def fail(error):
        def main():
            raise error

        return main

    for main, code, said in (
        (lambda: None, None, ""),
        (lambda: 1, 1, ""),
        (fail(ValueError("mend me")), 2, "error: mend me\n"),
        (fail(PermissionError(13, "Permission denied", "/x")), 2, "error: /x: Permission denied\n"),
        (fail(KeyboardInterrupt()), 130, "interrupted\n"),
    ):
        with pytest.raises(SystemExit) as ended:
            run_script(main)
        assert (ended.value.code, capsys.readouterr().err) == (code, said)
    with pytest.raises(TypeError):  # a mistake of ours keeps its traceback
        run_script(fail(TypeError("bug")))
