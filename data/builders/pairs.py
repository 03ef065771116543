"""Convert a user's image-text pairs to shards: a folder of images with captions, or a table of
images and captions.

    convert([Path("photos")], Path("datasets/photos")) -> Result

A *row* is an image with its caption: (where, read), a name for messages and a function that returns
(image bytes, caption) or raises ValueError or OSError. Rows are read one by one, and images are
stored unchanged. Sample `000000017` is the 17th row of the source, which its json member names;
rows that cannot be used are skipped, counted and listed.

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
from typing import TypeVar

from glimpse.data.evals.gallery import list_images, read_captions_beside
from glimpse.data.shards import IMAGE_EXTENSIONS, Sample, build_index, write_shard

Row = tuple[str, Callable[[], tuple[bytes, str]]]
T = TypeVar("T")
# Usual names, looked for in this order, in upper or lower case.
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
    *IMAGE_EXTENSIONS,
)
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

NAMED = 10  # skipped rows that are listed


@dataclass
class Result:
    written: int = 0
    skipped: Counter = field(default_factory=Counter)  # reason -> rows
    named: list[str] = field(default_factory=list)  # the first of them: row and reason
    index: dict = field(default_factory=dict)  # data.shards.build_index

    def skip(self, where: str, error: Exception) -> None:
        """Count a skipped row, and list it among the first NAMED."""
        why = str(error)
        if isinstance(error, OSError) and error.strerror:
            why = error.strerror
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
    """Write the shards OUT/pairs-00000.tar ... and their index.

    The same sources give the same bytes. progress(rows, total): wraps the rows, to show progress.
    """
    if per_shard < 1:
        raise ValueError(f"--per-shard: {per_shard}; it must be at least 1")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(
            f"--out: {out} exists and is not an empty folder; remove it or name another"
        )

    readers = [open_source(source, image_column, caption_column) for source in sources]
    total = sum(len(reader) for reader in readers)
    result = Result()
    samples = usable(progress(chain.from_iterable(readers), total), result)

    # Written to a temporary folder first: an interrupted conversion leaves no `out`.
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
        new = Path(folder, "new")
        new.mkdir()
        for shard in count():
            first = next(samples, None)
            if first is None:
                break
            members = chain([first], islice(samples, per_shard - 1))
            result.written += write_shard(new / f"pairs-{shard:05d}.tar", members)
        if not result.written:
            names = ", ".join(map(str, sources))
            skipped = result.skipped.total()
            problem = f"{names}: nothing to write, all {skipped} rows were skipped"
            raise ValueError("\n  ".join([problem, *result.named]))
        result.index = build_index(new)
        os.rename(new, out)
    return result


def usable(rows: Iterable[Row], result: Result) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield (key, parts) of the rows with an image and a caption; record others in `result`."""
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
    """Return jpg, png or webp, by the first bytes; ValueError for other formats."""
    if not image:
        raise ValueError("empty image")
    if image.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if image.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if image[:4] == b"RIFF" and image[8:12] == b"WEBP":
        return "webp"
    raise ValueError("the image is neither jpg, png nor webp")


def open_source(
    source: Path, image_column: str | None, caption_column: str | None
) -> "Folder | Csv | Parquet":
    """Return the source that reads a folder or a table; ValueError if it is neither."""
    if source.is_dir():
        return Folder(source)
    if not source.exists():
        raise ValueError(f"{source}: no such file or folder")
    kinds: dict[str, type[Csv] | type[Parquet]] = {
        ".csv": Csv,
        ".tsv": Csv,
        ".parquet": Parquet,
    }
    kind = kinds.get(source.suffix.lower())
    if kind is None:
        raise ValueError(
            f"{source}: not a source; it must be a folder of images with captions, or a"
            f" {', '.join(kinds)} table"
        )
    return kind(source, image_column, caption_column)


class Folder:
    """The images of a folder, in the order of `image_paths`.

    Each has its caption in NAME.txt or NAME.json beside it.
    """

    def __init__(self, root: Path):
        self.root = root
        self.paths = list_images(root)

    def __len__(self) -> int:
        return len(self.paths)

    def __iter__(self) -> Iterator[Row]:
        for path in map(Path, self.paths):
            yield path.relative_to(self.root).as_posix(), partial(read_file, path)


def read_file(path: Path) -> tuple[bytes, str]:
    """Return an image and the caption from the file beside it."""
    parts = read_captions_beside(path)
    if not parts:
        raise ValueError("no caption file beside it (same name, .txt or .json)")
    return path.read_bytes(), Sample("", "", parts).caption


class Csv:
    """A table in UTF-8 with a header line.

    Its separator is the comma, semicolon or tab, whichever the header has most of.
    """

    # The column beside the image: its name in messages, and its usual names.
    second: tuple[str, tuple[str, ...]] = ("caption", CAPTION_COLUMNS)

    def __init__(self, path: Path, image_column: str | None, caption_column: str | None):
        csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
        self.path = path
        with path.open("rb") as file:
            header = file.readline().decode("utf-8", errors="replace")
            self.lines = sum(1 for _ in file)
        self.separator = max("\t;,", key=header.count)
        columns: list[str] = next(self.read(csv.reader), [])
        self.columns = pick_columns(path, columns, image_column, caption_column, self.second)

    def __len__(self) -> int:
        return self.lines  # more than the rows, where captions hold line breaks

    def read(self, reader: Callable[..., Iterable[T]]) -> Iterator[T]:
        """Yield the rows of csv.reader or csv.DictReader; ValueError if the table is unreadable."""
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
        image_column, caption_column = self.columns
        for number, row in enumerate(self.read(csv.DictReader), start=1):
            yield table_row(self.path, number, row[image_column], row[caption_column])


class Parquet:
    """A parquet table; an image is bytes, a path, or Hugging Face's {bytes, path}."""

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
        image_column, caption_column = self.columns
        number = 0
        for batch in self.file.iter_batches(64, columns=list(self.columns)):
            for row in batch.to_pylist():
                number += 1
                yield table_row(self.path, number, row[image_column], row[caption_column])


def pick_columns(
    path: Path,
    columns: list[str],
    image: str | None,
    other: str | None,
    second: tuple[str, tuple[str, ...]] = Csv.second,
) -> tuple[str, str]:
    """Return the columns of the image and of the caption, or what `second` names.

    image, other: the columns that the user names; None takes the first usual name in the table.
    """
    first = ("image", IMAGE_COLUMNS)
    return pick_column(path, columns, image, *first), pick_column(path, columns, other, *second)


def pick_column(
    path: Path, columns: list[str], name: str | None, what: str, usual: tuple[str, ...]
) -> str:
    """Return the column `name`, or the first with a usual name; ValueError if there is none."""
    if name:
        matches = [column for column in columns if column == name]
        missing = f"no column {name!r}"
    else:
        # The first column wins where two differ only in case.
        by_name = {column.strip().lower(): column for column in reversed(columns)}
        matches = [by_name[candidate] for candidate in usual if candidate in by_name]
        missing = f"no column with a usual name for the {what}"
    if not matches:
        raise ValueError(
            f"{path}: {missing}; its columns: {', '.join(columns) or 'none'}; name one with"
            f" --{what}-column"
        )
    return matches[0]


def table_row(path: Path, number: int, image: object, caption: object) -> Row:
    """Return the row of a table's cells, which may hold anything.

    image: bytes, a path from the table's folder, or {bytes, path}; number: 1 for the first row
    below the header.
    """
    name = image if isinstance(image, str) else ""
    if isinstance(image, dict):
        name = image.get("path") or ""
        image = image.get("bytes") or image.get("path")
    where = f"{path.name} row {number}"
    if name:
        where += f" ({name})"
    return where, partial(read_cells, path.parent, image, caption)


def read_cells(folder: Path, image: object, caption: object) -> tuple[bytes, str]:
    """Return (image bytes, caption) of a table's cells; ValueError if one cannot be used."""
    if caption is None or caption == "":
        raise ValueError("no caption")
    if not isinstance(caption, str):
        raise ValueError(f"the caption is of type {type(caption).__name__}, not str")
    if image is None or image == "":
        raise ValueError("no image")
    if isinstance(image, bytes):
        return image, caption
    if not isinstance(image, str):
        raise ValueError(f"the image is of type {type(image).__name__}, not str or bytes")
    if "://" in image:
        raise ValueError("the image is a URL; download the images first, e.g. with img2dataset")
    return (folder / image).read_bytes(), caption
