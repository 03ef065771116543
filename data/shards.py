"""Tar shards of captioned images: writing, indexing, random access, and the order of a run.

A shard is a tar file in webdataset's convention: the files of a sample are adjacent and share a
key, e.g. `000017.jpg`, `000017.txt`. The index of a folder of shards is built once
(`run/prepare.py index DIR`, or on first use):

    DIR/shards.index.json           the tars, with the samples, bytes and extensions of each
    DIR/shards.index/NAME.tar.json  the offset of each file in a tar: reading a sample is one read

With the index, any sample can be read directly, and `Order` computes which sample is at position p
of a run from (seed, window, shards) alone. Ranks and workers only divide the positions among
themselves. A run that is resumed on any number of ranks and workers therefore sees every sample of
an epoch exactly once.
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
# Fields of a json file that can hold the caption; the first one present is used.
CAPTION_FIELDS = ("caption", "text", "TEXT")
MAX_OPEN_SHARDS = 64  # file handles and indexes that a process keeps in memory


@dataclass(frozen=True)
class Sample:
    """The files of one sample."""

    shard: str
    key: str
    files: dict[str, bytes]  # extension -> content

    @property
    def image(self) -> bytes:
        """The encoded image; ValueError if the sample has no image."""
        for extension in IMAGE_EXTENSIONS:
            if extension in self.files:
                return self.files[extension]
        present = ", ".join(self.files)
        allowed = ", ".join(IMAGE_EXTENSIONS)
        raise ValueError(f"no image: has {present}; an image is one of {allowed}")

    @property
    def captions(self) -> list[str]:
        """The captions: the txt file, or the caption field of the json file.

        The field may be a list of several captions. ValueError if there is neither.
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
        """The first caption."""
        return self.captions[0]


def write_shard(path: Path, samples: Iterable[tuple[str, dict[str, bytes]]]) -> int:
    """Write samples (key, {extension: content}) as one tar and return their number.

    Equal samples give equal bytes.
    """
    # An interrupted write leaves only the temporary file.
    temporary = path.with_name(path.name + ".part")
    count = 0
    with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, files in samples:
            if "." in key.rpartition("/")[2]:
                raise ValueError(
                    f"{path}: key {key!r} contains a dot, where the extension would begin; replace"
                    " the dots"
                )
            count += 1
            for extension, content in files.items():
                member = tarfile.TarInfo(f"{key}.{extension}")  # time and owner stay 0
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    os.replace(temporary, path)
    return count


def list_files(path: Path) -> list[tuple[str, str, int, int]]:
    """List the files in a tar, in order: [(key, extension, offset, bytes)].

    Raise ValueError if the tar is cut off, damaged or empty.
    """
    files = []
    try:
        with tarfile.open(path, "r:") as tar:  # raises ReadError if cut off within a file
            for member in tar:
                if member.isfile():
                    key, extension = split_name(member.name)
                    files.append((key, extension, member.offset_data, member.size))
            # tarfile treats a damaged header as the end of the tar; a real end consists of zeros.
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(512).strip(b"\0"):
                raise tarfile.ReadError(f"no header at byte {tar.offset}")
    except tarfile.TarError as error:
        raise ValueError(
            f"{path}: truncated or not a tar ({error}); fetch it again or remove it"
        ) from None
    if not files:
        raise ValueError(f"{path}: an empty shard; remove it")
    return files


def list_samples(path: Path) -> list[tuple[str, dict[str, tuple[int, int]]]]:
    """List the samples of a tar: [(key, {extension: (offset, bytes)})]; read only its headers."""
    return group_samples(list_files(path))


def group_samples(
    files: list[tuple[str, str, int, int]],
) -> list[tuple[str, dict[str, tuple[int, int]]]]:
    """Group the result of `list_files` into samples: adjacent files that share a key."""
    samples = []
    for key, group in groupby(files, key=lambda file: file[0]):
        members = {extension: (offset, size) for _, extension, offset, size in group}
        samples.append((key, members))
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
    """Index the tars in a folder, without its subfolders, and write and return the summary.

    progress: wraps the iteration over tars, e.g. with a progress bar.
    """
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise ValueError(f"{folder}: no *.tar in it; name the folder that holds the shards")
    (folder / "shards.index").mkdir(exist_ok=True)

    # Index each tar. Damaged ones are collected, so that one message lists all of them.
    rows = []
    errors = []
    for path in progress(paths):
        try:
            samples = list_samples(path)
        except ValueError as error:
            errors.append(str(error))
            continue
        replace_json(folder / "shards.index" / f"{path.name}.json", samples)
        extensions = Counter(extension for _, members in samples for extension in members)
        rows.append(
            dict(
                name=path.name,
                samples=len(samples),
                bytes=path.stat().st_size,
                extensions=dict(sorted(extensions.items())),
            )
        )
    if len(errors) == 1:
        raise ValueError(errors[0])
    if errors:
        summary = f"{folder}: {len(errors)} of {len(paths)} shards are unusable"
        raise ValueError("\n  ".join([summary, *errors]))

    # Write the summary last: a folder without it is indexed again.
    index = dict(version=INDEX_VERSION, shards=rows)
    replace_json(folder / "shards.index.json", index)
    return index


def replace_json(path: Path, value: object) -> None:
    """Write JSON completely or not at all, even if several jobs index a folder at once."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    temporary.write_text(json.dumps(value, ensure_ascii=False, separators=(",", ":")))
    os.replace(temporary, path)


def read_index(folder: Path) -> dict:
    """Load a folder's index, or build it, and check that the tars have not changed since."""
    path = folder / "shards.index.json"
    index = json.loads(path.read_text()) if path.exists() else build_index(folder)
    if index.get("version") != INDEX_VERSION:
        raise ValueError(
            f"{path}: version {index.get('version')!r}, but this code uses {INDEX_VERSION}; run:"
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

    row: the shard's entry in the index.
    """
    for content, extensions in (("images", IMAGE_EXTENSIONS), ("captions", CAPTION_EXTENSIONS)):
        if not any(extension in row["extensions"] for extension in extensions):
            path = folder / row["name"]
            present = ", ".join(row["extensions"])
            allowed = ", ".join(extensions)
            raise ValueError(
                f"{path}: no {content} (has {present}; {content} are one of {allowed});"
                " see data.train"
            )


def select_tars(source: str | Path) -> tuple[Path, list[str]]:
    """Split an entry of data.train into a folder and names of tars; an empty list means all.

    'DIR/{00000..00008}.tar' selects nine tars, with braces as in a shell and in webdataset.
    """
    path = Path(source)
    if path.suffix != ".tar" or path.is_dir():
        return path, []
    try:
        names = set(braceexpand(path.name))
    except ValueError as error:
        raise ValueError(f"{path}: {error}; see data.train") from None
    # Sorted like the index, so that the order in a config has no effect.
    return path.parent, sorted(names)


class Shards:
    """The samples of indexed folders of shards as one sequence: `len(shards)`, `shards[i]`.

    folders: folders of tars, or some tars of a folder, as FOLDER/NAME-{00000..00008}.tar.
    require_captions: raise ValueError unless every shard contains images and captions.
    """

    def __init__(self, folders: Iterable[str | Path], require_captions: bool = True):
        self.paths: list[Path] = []
        self.counts: list[int] = []
        for folder, selection in map(select_tars, folders):
            if not folder.is_dir():
                raise ValueError(f"{folder}: no such folder of shards; see data.train")
            rows = {row["name"]: row for row in read_index(folder)["shards"]}
            for name in selection or rows:
                if name not in rows:
                    raise ValueError(
                        f"{folder / name}: no such shard; the folder has {len(rows)},"
                        f" {min(rows)} to {max(rows)}; see data.train"
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
        """Read sample i; with `extensions`, read only its files that have one of these extensions.

        If it has no such file, read all of its files.
        """
        shard, index = self.locate(i)
        return self._open(self.paths[shard]).read(index, extensions)

    def locate(self, i: int) -> tuple[int, int]:
        """Return sample i as (shard, index in that shard)."""
        shard = bisect_right(self.ends, i)
        return shard, i - (self.ends[shard] - self.counts[shard])

    def name(self, i: int) -> tuple[str, str]:
        """Return (shard, key) of sample i; read only the index."""
        shard, index = self.locate(i)
        path = self.paths[shard]
        key, _ = self._open(path).samples[index]
        return path.name, key

    def __getstate__(self) -> dict:
        # File handles cannot be pickled: each worker process opens its own.
        return {name: value for name, value in vars(self).items() if name != "_open"}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state, _open=lru_cache(MAX_OPEN_SHARDS)(_OpenShard))


class _OpenShard:
    """An open tar with the offsets of its files."""

    def __init__(self, path: Path):
        self.name = path.name
        table = path.parent / "shards.index" / f"{path.name}.json"
        self.samples = json.loads(table.read_text())
        self.file = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "file"):
            os.close(self.file)

    def read(self, i: int, extensions: tuple[str, ...]) -> Sample:
        key, members = self.samples[i]
        # Without a match read all files, so that the caller's error message can list them.
        matches = [extension for extension in extensions if extension in members]
        if matches:
            members = {extension: members[extension] for extension in matches}

        # The files of a sample are adjacent: one read for all.
        start = min(offset for offset, _ in members.values())
        end = max(offset + size for offset, size in members.values())
        block = os.pread(self.file, end - start, start)
        if len(block) < end - start:
            raise ValueError(
                f"{self.name}: shorter than in its index; run: run/prepare.py index DIR"
            )

        files = {}
        for extension, (offset, size) in members.items():
            begin = offset - start
            files[extension] = block[begin : begin + size]
        return Sample(self.name, key, files)


class Order:
    """The order of a run: position -> (epoch, sample), a function of (seed, window, counts).

    Each epoch shuffles the shards, divides them into windows of `window` shards, and shuffles the
    samples within each window. That is random enough for contrastive batches, and local enough for
    a network file system. Positions continue over epochs, so a batch may contain samples of two.

    Generators: the shards of an epoch are shuffled with (seed, epoch), the samples of a window with
    (seed, epoch, 1 + index of the window). (NumPy pads a seed with zeros, so (a, b) and (a, b, 0)
    are the same generator.)
    """

    def __init__(self, counts: list[int], seed: int, window: int):
        self.counts = np.asarray(counts)
        self.seed = seed
        self.shards_per_window = window
        self.starts = np.concatenate([[0], np.cumsum(self.counts)[:-1]])
        self.total = int(self.counts.sum())
        # Consecutive positions share a window: its permutation is computed once.
        self._epoch = lru_cache(2)(self._epoch_windows)
        self._window = lru_cache(4)(self._shuffled_window)

    def __call__(self, position: int) -> tuple[int, int]:
        epoch, offset = divmod(position, self.total)
        _, ends = self._epoch(epoch)
        index = bisect_right(ends, offset)
        begin = ends[index - 1] if index else 0
        return epoch, int(self._window(epoch, index)[offset - begin])

    def _epoch_windows(self, epoch: int) -> tuple[list[np.ndarray], list[int]]:
        """Return the shards of each window of an epoch, and the offset at which it ends."""
        shards = np.random.default_rng((self.seed, epoch)).permutation(len(self.counts))
        size = self.shards_per_window
        windows = [shards[i : i + size] for i in range(0, len(shards), size)]
        sizes = [int(self.counts[window].sum()) for window in windows]
        return windows, list(accumulate(sizes))

    def _shuffled_window(self, epoch: int, index: int) -> np.ndarray:
        """Return the samples of a window in the order in which the run visits them."""
        shards = self._epoch(epoch)[0][index]
        begins = self.starts[shards]
        ends = begins + self.counts[shards]
        ranges = [np.arange(begin, end) for begin, end in zip(begins, ends)]
        samples = np.concatenate(ranges)
        return np.random.default_rng((self.seed, epoch, 1 + index)).permutation(samples)

    def __getstate__(self) -> dict:
        return dict(counts=list(self.counts), seed=self.seed, window=self.shards_per_window)

    def __setstate__(self, state: dict) -> None:
        Order.__init__(self, **state)
