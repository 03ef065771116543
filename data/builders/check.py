"""The preflight of a folder of shards: every sample read and decoded as training will, before ranks
are waiting for it.

    report = check(Path("datasets/mine"))       on all cores
    print(describe(report, max_bad=0.01, readers=8))

A shard is scanned in pieces, by a pool of processes; what the pieces find adds up. `refused` and
`stale` is what a run would not start with, `unreadable` what it would replace and, beyond its
`data.max_bad`, stop at.

To add a finding: a field of Found (a Counter or a list, so that it adds up), filled in `look`, told
in `describe`.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path

from glimpse.data.builders.pairs import kind_of
from glimpse.data.builders.worker_pool import workers
from glimpse.data.shards import Sample, grouped, headers, read_index, require_pairs
from glimpse.data.transforms import decode

NAMED = 10  # samples of a kind that are named
PIECES = 4  # for each process, so that all end at about the same time


@dataclass
class Found:
    """What was found in some samples."""

    counts: Counter = field(default_factory=Counter)  # seen, read, unreadable, empty, repeated
    per_shard: Counter = field(default_factory=Counter)  # samples -> shards
    words: Counter = field(default_factory=Counter)  # words in a caption -> captions
    widths: Counter = field(default_factory=Counter)  # pixels -> images
    heights: Counter = field(default_factory=Counter)
    kinds: Counter = field(default_factory=Counter)  # jpg, png, webp -> images
    refused: set[str] = field(default_factory=set)  # shards that training refuses, and why
    # where the index is not that of the shards, and what to do
    stale: set[str] = field(default_factory=set)
    unreadable: list[str] = field(default_factory=list)  # the first NAMED: shard, key, why
    empty: list[str] = field(default_factory=list)  # captions
    repeated: list[str] = field(default_factory=list)  # keys that a shard has more than once

    def add(self, other: "Found") -> None:
        for name in (f.name for f in fields(self)):
            mine, more = getattr(self, name), getattr(other, name)
            mine.extend(more) if isinstance(mine, list) else mine.update(more)

    def name(self, kind: str, shard: str, key: str, why: str = "") -> None:
        self.counts[kind] += 1
        if self.counts[kind] <= NAMED:
            getattr(self, kind).append(f"{shard}  {key}  {why}".rstrip())


@dataclass(frozen=True)
class Report:
    folder: Path
    sizes: list[int]  # bytes of each shard
    looked: int  # shards that samples were read from
    indexed: bool
    found: Found

    def faults(self, max_bad: float) -> list[str]:
        """Why a run on this data would not start, or not go on."""
        bad = self.found.counts["unreadable"] / max(1, self.found.counts["read"])
        faults = (
            [f"training refuses {counted(len(self.found.refused), 'shard')}"]
            if self.found.refused
            else []
        )
        faults += ["the index is stale"] if self.found.stale else []
        return faults + (
            [f"{bad:.2%} of the samples cannot be read, and data.max_bad is {max_bad:.2%}"]
            if bad > max_bad
            else []
        )


def check(
    folder: Path,
    sample: int | None = None,
    progress: Callable[[Iterable, int], Iterable] = lambda pieces, total: pieces,
) -> Report:
    """Read every sample of the folder's tars, or about `sample` of them, spread evenly; progress
    wraps the pieces, given their number.
    """
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise ValueError(f"{folder}: no *.tar in it; name the folder that holds the shards")
    if sample is not None and sample < 1:
        raise ValueError(f"--sample: {sample}; it must be at least 1")
    looked = paths if sample is None else paths[:: -(-len(paths) // sample)]
    cores = len(os.sched_getaffinity(0))
    # few shards: each is shared among processes
    pieces = 1 if sample else -(-PIECES * cores // len(looked))
    most = -(-sample // len(looked)) if sample else None
    indexed = (folder / "shards.index.json").exists()
    tasks = [(path, piece, pieces, most, indexed) for path in looked for piece in range(pieces)]
    found = Found(stale=stale_index(folder) if indexed else set())
    with workers() as results:
        for part in progress(results(scan, tasks), len(tasks)):
            found.add(part)
    return Report(folder, [path.stat().st_size for path in paths], len(looked), indexed, found)


def stale_index(folder: Path) -> set[str]:
    """What the index says that the folder's files do not."""
    try:
        rows = read_index(folder)["shards"]
    except ValueError as error:
        return {str(error)}
    return {
        changed(folder / row["name"])
        for row in rows
        if row["bytes"] != (folder / row["name"]).stat().st_size
    }


def changed(path: Path) -> str:
    return f"{path}: changed since it was indexed; run: run/prepare.py index {path.parent}"


def scan(task: tuple[Path, int, int, int | None, bool]) -> Found:
    """Every `pieces`-th sample of a shard, from number `piece` on, or `most` of all; piece 0 looks
    at the shard as a whole too.
    """
    path, piece, pieces, most, indexed = task
    found = Found()
    try:
        files = headers(path)
        require_pairs(
            path.parent,
            dict(name=path.name, extensions=sorted({extension for _, extension, _, _ in files})),
        )
    except ValueError as error:
        found.refused.add(str(error))
        return found
    samples = grouped(files)
    if piece == 0:
        look_at_shard(path, files, samples, indexed, found)
    step = max(1, len(samples) // most) if most else pieces
    with path.open("rb") as file:
        for key, parts in samples[piece::step][:most]:
            content = {
                extension: os.pread(file.fileno(), size, offset)
                for extension, (offset, size) in parts.items()
            }
            look(Sample(path.name, key, content), found)
    return found


def look_at_shard(
    path: Path, files: list[tuple], samples: list[tuple], indexed: bool, found: Found
) -> None:
    """Its keys, and whether its index still tells where they are."""
    found.counts["seen"] += len(samples)
    found.per_shard[len(samples)] += 1
    groups, names = (
        Counter(key for key, _ in samples),
        Counter((key, extension) for key, extension, _, _ in files),
    )
    for key in sorted(
        {k for k, n in groups.items() if n > 1} | {k for (k, _), n in names.items() if n > 1}
    ):
        found.name("repeated", path.name, key)
    table = path.parent / "shards.index" / f"{path.name}.json"
    if indexed and not (
        table.exists() and json.loads(table.read_text()) == json.loads(json.dumps(samples))
    ):
        found.stale.add(changed(path))


def look(sample: Sample, found: Found) -> None:
    """One sample, read as the loader reads it."""
    found.counts["read"] += 1
    try:
        caption, (height, width, _) = sample.caption, decode(sample.image).shape
    except (ValueError, OSError) as error:
        found.name("unreadable", sample.shard, sample.key, " ".join(str(error).split()))
        return
    if not caption:
        found.name("empty", sample.shard, sample.key)
    found.words[len(caption.split())] += 1
    found.widths[width] += 1
    found.heights[height] += 1
    try:
        found.kinds[kind_of(sample.image)] += 1
    except ValueError:  # e.g. a gif that calls itself jpg: it can be read
        found.kinds["other"] += 1


# --------------------------------------------------------------------------------------------------
# telling


def describe(report: Report, max_bad: float, readers: int) -> str:
    """What a person wants to know; readers: ranks x loader workers."""
    return "\n".join(lines(report, max_bad, readers))


def lines(report: Report, max_bad: float, readers: int) -> Iterator[str]:
    found, counts, shards = report.found, report.found.counts, len(report.sizes)
    where = "" if report.looked == shards else f" in the {report.looked:,} shards looked at"
    yield (
        f"{report.folder}: {counted(shards, 'shard')}, {human_bytes(sum(report.sizes))},"
        f" {counted(counts['seen'], 'sample')}{where}"
    )
    if counts["read"]:
        yield (
            f"  read         {counted(counts['read'], 'sample')}; below: smallest / median /"
            " largest"
        )
        yield f"  shards       {spread(found.per_shard)} samples"
        yield f"  captions     {spread(found.words)} words"
        yield (
            f"  images       {spread(found.widths)} pixels wide, {spread(found.heights)} high;"
            f" {shares(found.kinds)}"
        )
    yield f"  index        {index_state(report)}"
    yield (
        f"  readers      {readers} (ranks x workers): any number can share these shards, each reads"
        " by position in the index"
    )
    enough = "enough" if shards >= readers else "too few"
    yield (
        "               (streamed, without an index, every reader would need a shard of its own:"
        f" {shards:,} are {enough})"
    )
    for kind, what, so in TROUBLES:
        share = f" ({counts[kind] / counts['read']:.2%}){so}" if counts[kind] else ""
        yield f"  {what:12} {counted(counts[kind], 'sample')}{share}"
        yield from named(getattr(found, kind), counts[kind])
    yield from (f"  refused      {why}" for why in sorted(found.refused))
    yield from (f"  stale        {why}" for why in sorted(found.stale))
    faults = report.faults(max_bad)
    yield (
        f"not ready: {'; '.join(faults)}"
        if faults
        else f"ready: train with --set data.train={report.folder}"
    )


# field of Found, name, what comes of it
TROUBLES = (
    ("unreadable", "unreadable", "; training puts another in the place of each"),
    ("empty", "no caption", "; the caption is there, but empty: trained on like any other"),
    (
        "repeated",
        "repeated key",
        "; one key, one sample: files that follow each other under one key overwrite each other",
    ),
)


def index_state(report: Report) -> str:
    if not report.indexed:
        return f"none yet; the first run makes it, or: python run/prepare.py index {report.folder}"
    return "stale" if report.found.stale else "up to date"


def named(examples: list[str], total: int) -> Iterator[str]:
    yield from (f"               {example}" for example in examples[:NAMED])
    if total > NAMED:
        yield f"               ... and {total - NAMED:,} more"


def spread(values: Counter) -> str:
    """{value: how often} -> 'min / median / max'."""
    ordered, middle = sorted(values), (values.total() - 1) // 2
    if not ordered:
        return "-"
    seen = 0
    for median in ordered:
        seen += values[median]
        if seen > middle:
            break
    return f"{ordered[0]:,} / {median:,} / {ordered[-1]:,}"


def shares(values: Counter) -> str:
    return ", ".join(
        f"{name} {number / values.total():.1%}" for name, number in values.most_common()
    )


def counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def human_bytes(number: int) -> str:
    power = min(4, (len(str(number)) - 1) // 3)
    return (
        f"{number / 1000**power:.1f} {('bytes', 'kB', 'MB', 'GB', 'TB')[power]}"
        if power
        else f"{number} bytes"
    )
