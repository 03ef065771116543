"""Tar shards of captioned images: written, indexed, read at random, and put in one global order.

A shard is a tar in webdataset's convention: the members of a sample follow each other and share a
key, `000017.jpg`, `000017.txt`.
A folder of shards carries an index, made once (`run/prepare.py index DIR`, or on first use):

    DIR/shards.index.json           which tars there are, how many samples and bytes each has, which
                                    extensions
    DIR/shards.index/NAME.tar.json  where each member of that tar lies, so that one sample is one
        read

With it, sample i is a place in a file and `Order` is a pure function: position p of a run ->
(epoch, sample). Nothing depends on who reads, which is what makes a resumed run see every sample of
an epoch exactly once, on any number of ranks and workers.
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

VERSION = 1
IMAGES = ("jpg", "jpeg", "png", "webp")
CAPTIONS = ("txt", "json")
CAPTION_FIELDS = ("caption", "text", "TEXT")  # of a json member, the first that is there
OPEN_SHARDS = 64  # file handles and member tables a reader keeps


@dataclass(frozen=True)
class Sample:
    shard: str
    key: str
    parts: dict[str, bytes]  # extension -> content

    @property
    def image(self) -> bytes:
        for extension in IMAGES:
            if extension in self.parts:
                return self.parts[extension]
        raise ValueError(
            f"no image: has {', '.join(self.parts)}; an image is one of {', '.join(IMAGES)}"
        )

    @property
    def captions(self) -> list[str]:
        """The texts that belong to the image: the txt member, or the json member's caption field,
        which may list several.
        """
        if "txt" in self.parts:
            return [self.parts["txt"].decode("utf-8", errors="replace").strip()]
        fields = json.loads(self.parts.get("json", b"{}"))
        for name in CAPTION_FIELDS if isinstance(fields, dict) else ():
            texts = fields.get(name)
            texts = [texts] if isinstance(texts, str) else texts
            if isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts):
                return [text.strip() for text in texts if text.strip()] or [""]
        raise ValueError(
            f"no caption: has {', '.join(self.parts)}; a caption is a txt, or one of"
            f" {', '.join(CAPTION_FIELDS)} in a json"
        )

    @property
    def caption(self) -> str:
        """The first of them."""
        return self.captions[0]


def write_shard(path: Path, samples: Iterable[tuple[str, dict[str, bytes]]]) -> int:
    """Write (key, {extension: content}) as one tar and return how many; the same samples give the
    same bytes.
    """
    part, count = path.with_name(path.name + ".part"), 0
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


def headers(path: Path) -> list[tuple[str, str, int, int]]:
    """The files in a tar, in order: [(key, extension, offset, bytes)].

    ValueError: it is cut off, damaged or empty.
    """
    try:
        with tarfile.open(path, "r:") as tar:  # a tar cut off within a file raises ReadError here
            files = [(*split_name(m.name), m.offset_data, m.size) for m in tar if m.isfile()]
            tar.fileobj.seek(tar.offset)
            # tarfile takes a header that it cannot read for the end
            if tar.fileobj.read(512).strip(b"\0"):
                raise tarfile.ReadError(f"no header at byte {tar.offset}")
    except tarfile.TarError as error:
        raise ValueError(
            f"{path}: truncated or no tar ({error}); fetch it again or remove it"
        ) from None
    if not files:
        raise ValueError(f"{path}: an empty shard; remove it")
    return files


def members(path: Path) -> list[tuple[str, dict[str, tuple[int, int]]]]:
    """The samples of a tar in order: [(key, {extension: (offset, bytes)})]; reads headers only."""
    return grouped(headers(path))


def grouped(files: list[tuple[str, str, int, int]]) -> list[tuple[str, dict[str, tuple[int, int]]]]:
    """`headers` as samples: files that follow each other and share a key."""
    return [
        (key, {ext: (offset, size) for _, ext, offset, size in group})
        for key, group in groupby(files, key=lambda f: f[0])
    ]


def split_name(name: str) -> tuple[str, str]:
    """'a.b/0017.seg.png' -> ('a.b/0017', 'seg.png'), as webdataset splits: at the first dot of the
    file's own name.
    """
    folder, _, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return (f"{folder}/{stem}" if folder else stem), extension.lower()


def build_index(folder: Path, progress: Callable[[Iterable], Iterable] = iter) -> dict:
    """Index every tar of the folder (not below it) and return the summary; `progress` wraps the
    iteration over tars.
    """
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise ValueError(f"{folder}: no *.tar in it; name the folder that holds the shards")
    (folder / "shards.index").mkdir(exist_ok=True)
    rows, broken = [], []
    for path in progress(paths):
        try:
            samples = members(path)
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
    if broken:
        several = f"{folder}: {len(broken)} of {len(paths)} shards are unusable"
        raise ValueError(broken[0] if len(broken) == 1 else "\n  ".join([several, *broken]))
    index = dict(version=VERSION, shards=rows)
    replace_json(folder / "shards.index.json", index)
    return index


def replace_json(path: Path, value) -> None:
    """Whole or not at all, also where several jobs index one folder at the same time."""
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    part.write_text(json.dumps(value, ensure_ascii=False, separators=(",", ":")))
    os.replace(part, path)


def read_index(folder: Path) -> dict:
    """The folder's index, checked against the tars that are there now; built if there is none."""
    path = folder / "shards.index.json"
    index = json.loads(path.read_text()) if path.exists() else build_index(folder)
    if index.get("version") != VERSION:
        raise ValueError(
            f"{path}: version {index.get('version')!r}, this code writes {VERSION}; run:"
            f" run/prepare.py index {folder}"
        )
    there = {(p.name, p.stat().st_size) for p in folder.glob("*.tar")}
    indexed = {(row["name"], row["bytes"]) for row in index["shards"]}
    if there != indexed:
        raise ValueError(
            f"{path}: the tars changed (e.g. {sorted(there ^ indexed)[0][0]}); run: run/prepare.py"
            f" index {folder}"
        )
    return index


def require_pairs(folder: Path, row: dict) -> None:
    """A shard of a training set has images and captions, or the run stops here rather than at its
    first batch.
    """
    for what, known in (("images", IMAGES), ("captions", CAPTIONS)):
        if not any(extension in row["extensions"] for extension in known):
            have = ", ".join(row["extensions"])
            raise ValueError(
                f"{folder / row['name']}: no {what} (has {have}; {what} are one of"
                f" {', '.join(known)}); see data.train"
            )


def named(given: str | Path) -> tuple[Path, list[str]]:
    """A folder and which of its tars are meant, none for all: 'DIR/{00000..00008}.tar', in braces
    as shells and webdataset have them.
    """
    path = Path(given)
    if path.suffix != ".tar" or path.is_dir():
        return path, []
    try:
        # as the index lists them: the order in which they are named is nothing
        return path.parent, sorted(set(braceexpand(path.name)))
    except ValueError as error:
        raise ValueError(f"{path}: {error}; see data.train") from None


class Shards:
    """The samples of indexed shard folders as one list: `len(shards)`, `shards[i] -> Sample`.

    folders: each holds tars, or names some of a folder's, FOLDER/NAME-{00000..00008}.tar; captions:
    every shard must hold images and captions, else ValueError.
    """

    def __init__(self, folders: Iterable[str | Path], captions: bool = True):
        self.paths: list[Path] = []
        self.counts: list[int] = []
        for folder, chosen in map(named, folders):
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
                if captions:
                    require_pairs(folder, row)
                self.paths.append(folder / row["name"])
                self.counts.append(row["samples"])
        self.ends = list(accumulate(self.counts))
        self._open = lru_cache(OPEN_SHARDS)(_OpenShard)

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, i: int) -> Sample:
        return self.read(i)

    def read(self, i: int, only: tuple[str, ...] = ()) -> Sample:
        """Sample i; `only`: with those of its members alone, and no byte of the others read."""
        shard, place = self.locate(i)
        return self._open(self.paths[shard]).read(place, only)

    def locate(self, i: int) -> tuple[int, int]:
        """Sample i as (shard, place in that shard)."""
        shard = bisect_right(self.ends, i)
        return shard, i - (self.ends[shard] - self.counts[shard])

    def name(self, i: int) -> tuple[str, str]:
        """(shard, key) of sample i, read from the index alone."""
        shard, place = self.locate(i)
        return self.paths[shard].name, self._open(self.paths[shard]).samples[place][0]

    def __getstate__(self):  # file handles stay with the process that opened them
        return {name: value for name, value in vars(self).items() if name != "_open"}

    def __setstate__(self, state):
        vars(self).update(state, _open=lru_cache(OPEN_SHARDS)(_OpenShard))


class _OpenShard:
    """One tar, open, with its table of members."""

    def __init__(self, path: Path):
        self.name = path.name
        self.samples = json.loads((path.parent / "shards.index" / f"{path.name}.json").read_text())
        self.file = os.open(path, os.O_RDONLY)

    def __del__(self):
        if hasattr(self, "file"):
            os.close(self.file)

    def read(self, i: int, only: tuple[str, ...]) -> Sample:
        key, parts = self.samples[i]
        # none of them there: all, so that the caller can say what is
        parts = {ext: parts[ext] for ext in only if ext in parts} or parts
        start = min(offset for offset, _ in parts.values())
        end = max(offset + size for offset, size in parts.values())
        block = os.pread(self.file, end - start, start)  # the members lie side by side
        if len(block) < end - start:
            raise ValueError(f"{self.name}: shorter than its index says; run: run/prepare.py index")
        return Sample(
            self.name,
            key,
            {
                ext: block[offset - start : offset - start + size]
                for ext, (offset, size) in parts.items()
            },
        )


class Order:
    """The global order of a run: position -> (epoch, sample), the same for every reader.

    Each epoch visits the shards in a new order, `window` shards at a time, and mixes the samples
    within a window: random enough for contrastive batches, local enough for a network file system.
    Positions run on over the epochs, so a batch may straddle two.
    """

    def __init__(self, counts: list[int], seed: int, window: int):
        self.counts, self.seed, self.window = np.asarray(counts), seed, window
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
        return windows, list(accumulate(int(self.counts[w].sum()) for w in windows))

    def _mixed_window(self, epoch: int, window: int) -> np.ndarray:
        shards = self._epoch(epoch)[0][window]
        samples = np.concatenate(
            [np.arange(self.starts[s], self.starts[s] + self.counts[s]) for s in shards]
        )
        return np.random.default_rng((self.seed, epoch, 1 + window)).permutation(samples)

    def __getstate__(self):
        return dict(counts=list(self.counts), seed=self.seed, window=self.window)

    def __setstate__(self, state):
        self.__init__(**state)
