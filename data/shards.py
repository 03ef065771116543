"""Tar shards of captioned images: writing, indexing, random access, and one global order.

A shard is a tar in webdataset's convention: the members of a sample follow each other and share a
key, `000017.jpg`, `000017.txt`.
A folder of shards has an index, built once (`run/prepare.py index DIR`, or on first use):

    DIR/shards.index.json           the tars, with the samples, bytes and extensions of each
    DIR/shards.index/NAME.tar.json  the position of each member of a tar: one sample is one read

With the index, sample i is a place in a file and `Order` is a pure function: position p of a run ->
(epoch, sample). Nothing depends on the reader. A resumed run therefore sees every sample of an
epoch exactly once, on any number of ranks and workers.
"""

import io
import json
import os
import secrets
import tarfile
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, groupby
from pathlib import Path

import numpy as np
from braceexpand import braceexpand

INDEX_VERSION = 1
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
CAPTION_EXTENSIONS = ("txt", "json")
CAPTION_FIELDS = ("caption", "text", "TEXT")  # of a json member, the first that is there
MAX_OPEN_SHARDS = 64  # file handles and member tables a reader keeps


@dataclass(frozen=True)
class Sample:
    shard: str
    key: str
    files: dict[str, bytes]  # extension -> content

    @property
    def image(self) -> bytes:
        for extension in IMAGE_EXTENSIONS:
            if extension in self.files:
                return self.files[extension]
        raise ValueError(
            f"no image: has {', '.join(self.files)}; an image is one of {', '.join(IMAGE_EXTENSIONS)}"
        )

    @property
    def captions(self) -> list[str]:
        """The captions of the image: its txt member, or the caption field of its json member.

        The field may be a list of several captions.
        """
        if "txt" in self.files:
            return [self.files["txt"].decode("utf-8", errors="replace").strip()]
        fields = json.loads(self.files.get("json", b"{}"))
        if not isinstance(fields, dict):
            fields = {}
        for name in CAPTION_FIELDS:
            texts = fields.get(name)
            if isinstance(texts, str):
                texts = [texts]
            if isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts):
                stripped = [text.strip() for text in texts]
                return [text for text in stripped if text] or [""]
        raise ValueError(
            f"no caption: has {', '.join(self.files)}; a caption is a txt, or one of"
            f" {', '.join(CAPTION_FIELDS)} in a json"
        )

    @property
    def caption(self) -> str:
        """The first of the captions."""
        return self.captions[0]


def write_shard(path: Path, samples: Iterable[tuple[str, dict[str, bytes]]]) -> int:
    """Write (key, {extension: content}) as one tar and return the number of samples.

    The same samples give the same bytes.
    """
    part = path.with_name(path.name + ".part")
    count = 0
    with tarfile.open(part, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, parts in samples:
            if "." in key.rpartition("/")[2]:
                raise ValueError(
                    f"{path}: key {key!r} has a dot, where its extension would begin; replace the"
                    " dots"
                )
            count += 1
            for extension, content in parts.items():
                member = tarfile.TarInfo(f"{key}.{extension}")  # no time, no owner: TarInfo's zeros
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    os.replace(part, path)
    return count


def list_files(path: Path) -> list[tuple[str, str, int, int]]:
    """List the files in a tar, in order: [(key, extension, offset, bytes)].

    Raise ValueError if the tar is cut off, damaged or empty.
    """
    files = []
    try:
        with tarfile.open(path, "r:") as tar:  # a tar cut off within a file raises ReadError here
            for member in tar:
                if member.isfile():
                    key, extension = split_name(member.name)
                    files.append((key, extension, member.offset_data, member.size))
            # tarfile mistakes a header that it cannot read for the end of the tar.
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(512).strip(b"\0"):
                raise tarfile.ReadError(f"no header at byte {tar.offset}")
    except tarfile.TarError as error:
        raise ValueError(
            f"{path}: truncated or no tar ({error}); fetch it again or remove it"
        ) from None
    if not files:
        raise ValueError(f"{path}: an empty shard; remove it")
    return files


def list_samples(path: Path) -> list[tuple[str, dict[str, tuple[int, int]]]]:
    """List the samples of a tar: [(key, {extension: (offset, bytes)})]; reads headers only."""
    return group_samples(list_files(path))


def group_samples(
    files: list[tuple[str, str, int, int]],
) -> list[tuple[str, dict[str, tuple[int, int]]]]:
    """Group the files of `headers` into samples: neighbors that share a key."""
    samples = []
    for key, group in groupby(files, key=lambda file: file[0]):
        parts = {extension: (offset, size) for _, extension, offset, size in group}
        samples.append((key, parts))
    return samples


def split_name(name: str) -> tuple[str, str]:
    """Split 'a.b/0017.seg.png' into ('a.b/0017', 'seg.png').

    As in webdataset, the extension begins at the first dot of the file name.
    """
    folder, _, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    key = f"{folder}/{stem}" if folder else stem
    return key, extension.lower()


def build_index(folder: Path, progress: Callable[[Iterable], Iterable] = iter) -> dict:
    """Index every tar of the folder (not of its subfolders) and return the summary.

    progress: wraps the iteration over tars.
    """
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise ValueError(f"{folder}: no *.tar in it; name the folder that holds the shards")
    (folder / "shards.index").mkdir(exist_ok=True)

    # The members of each tar. A tar that cannot be read does not stop the others.
    rows = []
    broken = []
    for path in progress(paths):
        try:
            samples = list_samples(path)
        except ValueError as error:
            broken.append(str(error))
            continue
        replace_json(folder / "shards.index" / f"{path.name}.json", samples)
        extensions = Counter(extension for _, parts in samples for extension in parts)
        rows.append(
            dict(
                name=path.name,
                samples=len(samples),
                bytes=path.stat().st_size,
                extensions=dict(sorted(extensions.items())),
            )
        )
    if len(broken) == 1:
        raise ValueError(broken[0])
    if broken:
        several = f"{folder}: {len(broken)} of {len(paths)} shards are unusable"
        raise ValueError("\n  ".join([several, *broken]))

    # The summary last: a folder without it is indexed again.
    index = dict(version=INDEX_VERSION, shards=rows)
    replace_json(folder / "shards.index.json", index)
    return index


def replace_json(path: Path, value: object) -> None:
    """Write JSON completely or not at all, even if several jobs index one folder at a time."""
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    part.write_text(json.dumps(value, ensure_ascii=False, separators=(",", ":")))
    os.replace(part, path)


def read_index(folder: Path) -> dict:
    """Load the folder's index and check it against the tars; build it if there is none."""
    path = folder / "shards.index.json"
    index = json.loads(path.read_text()) if path.exists() else build_index(folder)
    if index.get("version") != INDEX_VERSION:
        raise ValueError(
            f"{path}: version {index.get('version')!r}, this code writes {INDEX_VERSION}; run:"
            f" run/prepare.py index {folder}"
        )
    present = {(tar.name, tar.stat().st_size) for tar in folder.glob("*.tar")}
    indexed = {(row["name"], row["bytes"]) for row in index["shards"]}
    if present != indexed:
        example, _ = min(present ^ indexed)
        raise ValueError(
            f"{path}: the tars changed (e.g. {example}); run: run/prepare.py index {folder}"
        )
    return index


def require_pairs(folder: Path, row: dict) -> None:
    """Raise ValueError if a training shard has no images or no captions.

    The run stops here rather than at its first batch.
    """
    for what, known in (("images", IMAGE_EXTENSIONS), ("captions", CAPTION_EXTENSIONS)):
        if not any(extension in row["extensions"] for extension in known):
            path = folder / row["name"]
            present = ", ".join(row["extensions"])
            allowed = ", ".join(known)
            raise ValueError(
                f"{path}: no {what} (has {present}; {what} are one of {allowed}); see data.train"
            )


def select_tars(source: str | Path) -> tuple[Path, list[str]]:
    """Return a folder and the names of the tars chosen from it; an empty list means all.

    'DIR/{00000..00008}.tar' chooses nine, with braces as in a shell and in webdataset.
    """
    path = Path(source)
    if path.suffix != ".tar" or path.is_dir():
        return path, []
    try:
        names = set(braceexpand(path.name))
    except ValueError as error:
        raise ValueError(f"{path}: {error}; see data.train") from None
    # Sorted like the index: the order in which a config names them has no effect.
    return path.parent, sorted(names)


class Shards:
    """The samples of indexed shard folders as one list: `len(shards)`, `shards[i] -> Sample`.

    folders: folders of tars, or some tars of a folder, as FOLDER/NAME-{00000..00008}.tar.
    captions: raise ValueError unless every shard holds images and captions.
    """

    def __init__(self, folders: Iterable[str | Path], require_captions: bool = True):
        self.paths: list[Path] = []
        self.counts: list[int] = []
        for folder, chosen in map(select_tars, folders):
            if not folder.is_dir():
                raise ValueError(f"{folder}: no such folder of shards; see data.train")
            rows = {row["name"]: row for row in read_index(folder)["shards"]}
            for name in chosen or rows:
                if name not in rows:
                    raise ValueError(
                        f"{folder / name}: no such shard of {len(rows)}, {min(rows)} to"
                        f" {max(rows)}; see data.train"
                    )
                row = rows[name]
                if require_captions:
                    require_pairs(folder, row)
                self.paths.append(folder / row["name"])
                self.counts.append(row["samples"])
        self.ends = list(accumulate(self.counts))
        self._open = lru_cache(MAX_OPEN_SHARDS)(_OpenShard)

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, i: int) -> Sample:
        return self.read(i)

    def read(self, i: int, extensions: tuple[str, ...] = ()) -> Sample:
        """Read sample i; only: extensions of the members to read, without any byte of the rest."""
        shard, place = self.locate(i)
        return self._open(self.paths[shard]).read(place, extensions)

    def locate(self, i: int) -> tuple[int, int]:
        """Return sample i as (shard, place in that shard)."""
        shard = bisect_right(self.ends, i)
        return shard, i - (self.ends[shard] - self.counts[shard])

    def name(self, i: int) -> tuple[str, str]:
        """Return (shard, key) of sample i, read from the index alone."""
        shard, place = self.locate(i)
        path = self.paths[shard]
        key, _ = self._open(path).samples[place]
        return path.name, key

    def __getstate__(self) -> dict:
        # File handles stay with the process that opened them.
        return {name: value for name, value in vars(self).items() if name != "_open"}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state, _open=lru_cache(MAX_OPEN_SHARDS)(_OpenShard))


class _OpenShard:
    """An open tar with its table of members."""

    def __init__(self, path: Path):
        self.name = path.name
        table = path.parent / "shards.index" / f"{path.name}.json"
        self.samples = json.loads(table.read_text())
        self.file = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "file"):
            os.close(self.file)

    def read(self, i: int, only: tuple[str, ...]) -> Sample:
        key, parts = self.samples[i]
        selected = {extension: parts[extension] for extension in only if extension in parts}
        if selected:  # else all, so that the caller can say which members there are
            parts = selected

        # The members of a sample lie side by side: one read for all.
        start = min(offset for offset, _ in parts.values())
        end = max(offset + size for offset, size in parts.values())
        block = os.pread(self.file, end - start, start)
        if len(block) < end - start:
            raise ValueError(f"{self.name}: shorter than its index says; run: run/prepare.py index")

        contents = {}
        for extension, (offset, size) in parts.items():
            begin = offset - start
            contents[extension] = block[begin : begin + size]
        return Sample(self.name, key, contents)


class Order:
    """The global order of a run: position -> (epoch, sample), the same for every reader.

    Each epoch visits the shards in a new order, `window` shards at a time, and mixes the samples
    within a window: random enough for contrastive batches, local enough for a network file system.
    Positions run on over the epochs, so a batch may straddle two.
    """

    def __init__(self, counts: list[int], seed: int, window: int):
        self.counts = np.asarray(counts)
        self.seed = seed
        self.window = window
        self.starts = np.concatenate([[0], np.cumsum(self.counts)[:-1]])
        self.total = int(self.counts.sum())
        self._epoch = lru_cache(2)(self._epoch_windows)
        self._window = lru_cache(4)(self._mixed_window)

    def __call__(self, position: int) -> tuple[int, int]:
        epoch, place = divmod(position, self.total)
        _, ends = self._epoch(epoch)
        window = bisect_right(ends, place)
        begin = ends[window - 1] if window else 0
        return epoch, int(self._window(epoch, window)[place - begin])

    def _epoch_windows(self, epoch: int) -> tuple[list[np.ndarray], list[int]]:
        shards = np.random.default_rng((self.seed, epoch)).permutation(len(self.counts))
        windows = [shards[i : i + self.window] for i in range(0, len(shards), self.window)]
        sizes = [int(self.counts[window].sum()) for window in windows]
        return windows, list(accumulate(sizes))

    def _mixed_window(self, epoch: int, window: int) -> np.ndarray:
        shards = self._epoch(epoch)[0][window]
        begins = self.starts[shards]
        ends = begins + self.counts[shards]
        ranges = [np.arange(begin, end) for begin, end in zip(begins, ends)]
        samples = np.concatenate(ranges)
        return np.random.default_rng((self.seed, epoch, 1 + window)).permutation(samples)

    def __getstate__(self) -> dict:
        return dict(counts=list(self.counts), seed=self.seed, window=self.window)

    def __setstate__(self, state: dict) -> None:
        Order.__init__(self, **state)
