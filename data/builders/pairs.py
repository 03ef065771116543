"""A user's own image-text pairs -> shards: a folder of images with captions, or a table of images
and captions.

    convert([Path("photos")], Path("datasets/photos")) -> Result

A *row* is one image with its caption, wherever they lie: (where, read), a name for messages and a
function that returns (image bytes, caption) or raises ValueError or OSError. Rows are read one by
one and images stored as they are. Sample `000000017` is the 17th row of the source, which its json
member names; rows that cannot be used are skipped, counted and named.

To add a kind of source: a class with __len__ and __iter__ over rows, and a line in `open_source`.
"""

import csv
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, count, islice
from pathlib import Path

from glimpse.data.evals.gallery import captions_beside, image_paths
from glimpse.data.shards import IMAGES, Sample, build_index, write_shard

Row = tuple[str, Callable[[], tuple[bytes, str]]]
IMAGE_COLUMNS = (
    "image",
    "img",
    "image_path",
    "img_path",
    "image_file",
    "filepath",
    "file_path",
    "path",
    "file_name",
    "filename",
    "file",
    "image_bytes",
    "bytes",
    *IMAGES,
)  # in this order; upper or lower case
CAPTION_COLUMNS = (
    "caption",
    "text",
    "txt",
    "title",
    "description",
    "alt_text",
    "alt",
    "sentence",
    "prompt",
)

NAMED = 10  # skipped rows that are named


@dataclass
class Result:
    written: int = 0
    skipped: Counter = field(default_factory=Counter)  # why -> how many
    named: list[str] = field(default_factory=list)  # the first of them: where, and why
    index: dict = field(default_factory=dict)  # data.shards.build_index

    def skip(self, where: str, error: Exception) -> None:
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        self.skipped[why] += 1
        if len(self.named) < NAMED:
            self.named.append(f"{where}: {why}")


def convert(
    sources: list[Path],
    out: Path,
    *,
    per_shard: int = 10000,
    image_column: str | None = None,
    caption_column: str | None = None,
    progress: Callable[[Iterable, int], Iterable] = lambda rows, total: rows,
) -> Result:
    """Write OUT/pairs-00000.tar ...

    and the index; the same sources give the same bytes. progress wraps the rows, given their
    number.
    """
    if per_shard < 1:
        raise ValueError(f"--per-shard: {per_shard}; it must be at least 1")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(
            f"--out: {out} exists and is not an empty folder; remove it or name another"
        )
    opened = [open_source(source, image_column, caption_column) for source in sources]
    result = Result()
    samples = usable(progress(chain.from_iterable(opened), sum(map(len, opened))), result)
    out.parent.mkdir(parents=True, exist_ok=True)
    # broken off, a conversion leaves no `out`
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
        new = Path(folder, "new")
        new.mkdir()
        for shard in count():
            first = next(samples, None)
            if first is None:
                break
            result.written += write_shard(
                new / f"pairs-{shard:05d}.tar", chain([first], islice(samples, per_shard - 1))
            )
        if not result.written:
            names = ", ".join(map(str, sources))
            raise ValueError(
                "\n  ".join(
                    [
                        (
                            f"{names}: nothing to write, all {result.skipped.total()} rows were"
                            " skipped"
                        ),
                        *result.named,
                    ]
                )
            )
        result.index = build_index(new)
        os.rename(new, out)
    return result


def usable(rows: Iterable[Row], result: Result) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, parts) of the rows that have both an image and a caption; the others go to `result`."""
    for number, (where, read) in enumerate(rows, start=1):
        try:
            image, caption = read()
            if not caption.strip():
                raise ValueError("empty caption")
            about = json.dumps({"source": where}, ensure_ascii=False)
            parts = {
                kind_of(image): image,
                "txt": caption.strip().encode(errors="replace"),
                "json": about.encode(errors="replace"),
            }
        except (ValueError, OSError) as error:
            result.skip(where, error)
        else:
            yield f"{number:09d}", parts


def kind_of(image: bytes) -> str:
    """jpg, png or webp, as the bytes themselves say."""
    if not image:
        raise ValueError("empty image")
    if image.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if image.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if image[:4] == b"RIFF" and image[8:12] == b"WEBP":
        return "webp"
    raise ValueError("the image is neither jpg, png nor webp")


def open_source(source: Path, image_column: str | None, caption_column: str | None):
    if source.is_dir():
        return Folder(source)
    if not source.exists():
        raise ValueError(f"{source}: no such file or folder")
    kinds = {".csv": Csv, ".tsv": Csv, ".parquet": Parquet}
    if source.suffix.lower() not in kinds:
        raise ValueError(
            f"{source}: not a source; it must be a folder of images with captions, or a"
            f" {', '.join(kinds)} table"
        )
    return kinds[source.suffix.lower()](source, image_column, caption_column)


class Folder:
    """The images of a folder, in the order of `image_paths`; an image has NAME.txt or NAME.json
    beside it.
    """

    def __init__(self, root: Path):
        self.root, self.paths = root, image_paths(root)

    def __len__(self) -> int:
        return len(self.paths)

    def __iter__(self) -> Iterator[Row]:
        for path in map(Path, self.paths):
            yield path.relative_to(self.root).as_posix(), partial(read_file, path)


def read_file(path: Path) -> tuple[bytes, str]:
    parts = captions_beside(path)
    if not parts:
        raise ValueError("no caption file beside it (same name, .txt or .json)")
    return path.read_bytes(), Sample("", "", parts).caption


class Csv:
    """A table in UTF-8 with a header line; commas, semicolons or tabs, whichever the header has
    most of.
    """

    second = ("caption", CAPTION_COLUMNS)  # what is looked for beside the image

    def __init__(self, path: Path, image_column: str | None, caption_column: str | None):
        csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
        self.path = path
        with path.open("rb") as file:
            header = file.readline().decode("utf-8", errors="replace")
            self.lines = sum(1 for _ in file)
        self.separator = max("\t;,", key=header.count)
        columns = next(self.read(csv.reader), [])
        self.columns = pick_columns(path, columns, image_column, caption_column, self.second)

    def __len__(self) -> int:
        return self.lines  # more than the rows, where captions hold line breaks

    def read(self, reader: Callable) -> Iterator:
        try:
            with self.path.open(encoding="utf-8-sig", newline="") as file:
                yield from reader(file, delimiter=self.separator)
        except UnicodeDecodeError:
            raise ValueError(
                f"{self.path}: not UTF-8; convert it, e.g. with: iconv -f latin1 -t utf-8"
            ) from None
        except csv.Error as error:
            raise ValueError(f"{self.path}: {error}") from None

    def __iter__(self) -> Iterator[Row]:
        for number, row in enumerate(self.read(csv.DictReader), start=1):
            yield table_row(self.path, number, *(row[column] for column in self.columns))


class Parquet:
    """A parquet table; an image is bytes, a path, or {bytes, path} as Hugging Face's data sets have
    it.
    """

    def __init__(self, path: Path, image_column: str | None, caption_column: str | None):
        try:
            import pyarrow.parquet
        except ImportError:
            raise ValueError(
                f"{path}: reading parquet needs pyarrow; run: pip install pyarrow"
            ) from None
        self.path = path
        try:
            self.file = pyarrow.parquet.ParquetFile(path)
        except pyarrow.ArrowInvalid as error:
            raise ValueError(f"{path}: {error}") from None
        self.columns = pick_columns(
            path, self.file.schema_arrow.names, image_column, caption_column
        )

    def __len__(self) -> int:
        return self.file.metadata.num_rows

    def __iter__(self) -> Iterator[Row]:
        rows = (
            row
            for batch in self.file.iter_batches(64, columns=list(self.columns))
            for row in batch.to_pylist()
        )
        for number, row in enumerate(rows, start=1):
            yield table_row(self.path, number, *(row[column] for column in self.columns))


def pick_columns(
    path: Path,
    columns: list[str],
    image: str | None,
    other: str | None,
    second: tuple[str, tuple[str, ...]] = Csv.second,
) -> tuple[str, str]:
    """The columns that hold the image and the caption, or what `second` names: those given, else
    the first usual name that is there.
    """
    picked = []
    for given, (what, known) in ((image, ("image", IMAGE_COLUMNS)), (other, second)):
        lower = {column.strip().lower(): column for column in reversed(columns)}
        found = next(
            (
                (c for c in columns if c == given)
                if given
                else (lower[name] for name in known if name in lower)
            ),
            None,
        )
        if found is None:
            missing = (
                f"no column {given!r}" if given else f"no column with a usual name for the {what}"
            )
            raise ValueError(
                f"{path}: {missing}; its columns: {', '.join(columns) or 'none'}; name one with"
                f" --{what}-column"
            )
        picked.append(found)
    return picked[0], picked[1]


def table_row(path: Path, number: int, image, caption) -> Row:
    """image: bytes, a path from the table's folder, or {bytes, path}; number: 1 for the first row
    below the header.
    """
    if isinstance(image, dict):
        image, name = image.get("bytes") or image.get("path"), image.get("path") or ""
    else:
        name = image if isinstance(image, str) else ""
    return f"{path.name} row {number}{name and f' ({name})'}", partial(
        read_cells, path.parent, image, caption
    )


def read_cells(folder: Path, image, caption) -> tuple[bytes, str]:
    for what, value, kinds in (("caption", caption, (str,)), ("image", image, (str, bytes))):
        if value is None or value == "":
            raise ValueError(f"no {what}")
        if not isinstance(value, kinds):
            raise ValueError(
                f"the {what} is of type {type(value).__name__}, not"
                f" {' or '.join(kind.__name__ for kind in kinds)}"
            )
    if isinstance(image, str) and "://" in image:
        raise ValueError("the image is a URL; download the images first, e.g. with img2dataset")
    return (folder / image).read_bytes() if isinstance(image, str) else image, caption
