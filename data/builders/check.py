"""Check a folder of shards before training: read and decode every sample as the loader will.

    report = check(Path("datasets/mine"))       on all cores
    print(describe(report, max_bad=0.01, readers=8))

A pool of processes scans each shard in pieces, and the findings of the pieces are added up. A run
refuses to start with shards that are `refused` or `stale`. It replaces samples that are
`unreadable`, and stops if their share exceeds `data.max_bad`.

To add a finding: a field of Found (a Counter, set or list, so that it adds up), filled in `look`,
printed in `describe`.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path

from glimpse.data.builders.pairs import kind_of
from glimpse.data.builders.worker_pool import workers
from glimpse.data.shards import Sample, group_samples, list_files, read_index, require_pairs
from glimpse.data.transforms import decode

NAMED = 10  # samples of each kind that are listed
PIECES = 4  # per process, so that all end at about the same time


@dataclass
class Found:
    """Findings of some samples."""

    counts: Counter = field(default_factory=Counter)  # seen, read, unreadable, empty, repeated
    per_shard: Counter = field(default_factory=Counter)  # samples -> shards
    words: Counter = field(default_factory=Counter)  # words in a caption -> captions
    widths: Counter = field(default_factory=Counter)  # pixels -> images
    heights: Counter = field(default_factory=Counter)
    kinds: Counter = field(default_factory=Counter)  # jpg, png, webp -> images
    refused: set[str] = field(default_factory=set)  # shards that training refuses, and why
    # shards that changed since they were indexed, and what to do
    stale: set[str] = field(default_factory=set)
    unreadable: list[str] = field(default_factory=list)  # the first NAMED: shard, key, why
    empty: list[str] = field(default_factory=list)  # captions
    repeated: list[str] = field(default_factory=list)  # keys that a shard has more than once

    def add(self, other: "Found") -> None:
        """Add the findings of other samples."""
        for f in fields(self):
            total = getattr(self, f.name)
            more = getattr(other, f.name)
            if isinstance(total, list):
                total.extend(more)
            else:
                total.update(more)

    def name(self, kind: str, shard: str, key: str, why: str = "") -> None:
        """Count a sample of a kind, and list it among the first NAMED."""
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
        """Return the reasons why a run on this data would not start, or would stop."""
        faults = []
        if self.found.refused:
            faults.append(f"training refuses {counted(len(self.found.refused), 'shard')}")
        if self.found.stale:
            faults.append("the index is stale")
        bad = self.found.counts["unreadable"] / max(1, self.found.counts["read"])
        if bad > max_bad:
            faults.append(
                f"{bad:.2%} of the samples cannot be read, and data.max_bad is {max_bad:.2%}"
            )
        return faults


def check(
    folder: Path,
    sample: int | None = None,
    progress: Callable[[Iterable, int], Iterable] = lambda pieces, total: pieces,
) -> Report:
    """Read every sample of the folder's tars, or about `sample` of them, spread evenly.

    progress(pieces, total): wraps the pieces, to show progress.
    """
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise ValueError(f"{folder}: no *.tar in it; name the folder that holds the shards")
    if sample is not None and sample < 1:
        raise ValueError(f"--sample: {sample}; it must be at least 1")

    # Shards to read, pieces of each, and samples of each piece.
    if sample is None:
        # A few shards are each shared among processes.
        scanned = paths
        cores = len(os.sched_getaffinity(0))
        pieces = ceil_divide(PIECES * cores, len(scanned))
        most = None
    else:
        scanned = paths[:: ceil_divide(len(paths), sample)]
        pieces = 1
        most = ceil_divide(sample, len(scanned))
    indexed = (folder / "shards.index.json").exists()
    tasks = [(path, piece, pieces, most, indexed) for path in scanned for piece in range(pieces)]

    # Scan them on all cores.
    findings = Found(stale=stale_index(folder) if indexed else set())
    with workers() as results:
        for piece_findings in progress(results(scan, tasks), len(tasks)):
            findings.add(piece_findings)
    sizes = [path.stat().st_size for path in paths]
    return Report(folder, sizes, len(scanned), indexed, findings)


def ceil_divide(a: int, b: int) -> int:
    """Return a / b, rounded up."""
    return -(-a // b)


def stale_index(folder: Path) -> set[str]:
    """Return a message for each shard whose size is not the one in the index."""
    try:
        rows = read_index(folder)["shards"]
    except ValueError as error:
        return {str(error)}
    stale = set()
    for row in rows:
        path = folder / row["name"]
        if row["bytes"] != path.stat().st_size:
            stale.add(changed(path))
    return stale


def changed(path: Path) -> str:
    """Return the message about a shard that the index does not describe."""
    return f"{path}: changed since it was indexed; run: run/prepare.py index {path.parent}"


def scan(task: tuple[Path, int, int, int | None, bool]) -> Found:
    """Read every `pieces`-th sample of a shard from number `piece` on, or `most` of all.

    task: (path, piece, pieces, most, indexed). Piece 0 also checks the keys of the whole shard.
    """
    path, piece, pieces, most, indexed = task
    findings = Found()

    # The tar's headers, and whether training takes the shard at all.
    try:
        files = list_files(path)
        extensions = sorted({extension for _, extension, _, _ in files})
        require_pairs(path.parent, dict(name=path.name, extensions=extensions))
    except ValueError as error:
        findings.refused.add(str(error))
        return findings
    samples = group_samples(files)
    if piece == 0:
        look_at_shard(path, files, samples, indexed, findings)

    # The samples themselves.
    step = max(1, len(samples) // most) if most else pieces
    with path.open("rb") as file:
        for key, parts in samples[piece::step][:most]:
            content = {}
            for extension, (offset, size) in parts.items():
                content[extension] = os.pread(file.fileno(), size, offset)
            look(Sample(path.name, key, content), findings)
    return findings


def look_at_shard(
    path: Path, files: list[tuple], samples: list[tuple], indexed: bool, findings: Found
) -> None:
    """Check a shard's keys, and whether the index still has the positions of its samples."""
    findings.counts["seen"] += len(samples)
    findings.per_shard[len(samples)] += 1

    # A key is repeated if several samples, or several files of one kind, have it.
    keys = Counter(key for key, _ in samples)
    names = Counter((key, extension) for key, extension, _, _ in files)
    repeated = {key for key, n in keys.items() if n > 1}
    repeated |= {key for (key, _), n in names.items() if n > 1}
    for key in sorted(repeated):
        findings.name("repeated", path.name, key)

    if indexed and not index_has(path, samples):
        findings.stale.add(changed(path))


def index_has(path: Path, samples: list[tuple]) -> bool:
    """Return True if the shard's table in the index lists exactly these samples."""
    table = path.parent / "shards.index" / f"{path.name}.json"
    if not table.exists():
        return False
    # json turns tuples into lists
    return json.loads(table.read_text()) == json.loads(json.dumps(samples))


def look(sample: Sample, findings: Found) -> None:
    """Read and decode a sample as the loader does."""
    findings.counts["read"] += 1
    try:
        caption = sample.caption
        height, width, _channels = decode(sample.image).shape
    except (ValueError, OSError) as error:
        why = " ".join(str(error).split())
        findings.name("unreadable", sample.shard, sample.key, why)
        return
    if not caption:
        findings.name("empty", sample.shard, sample.key)
    findings.words[len(caption.split())] += 1
    findings.widths[width] += 1
    findings.heights[height] += 1
    try:
        findings.kinds[kind_of(sample.image)] += 1
    except ValueError:  # e.g. a gif named .jpg, which can be read
        findings.kinds["other"] += 1


# --------------------------------------------------------------------------------------------------
# report


def describe(report: Report, max_bad: float, readers: int) -> str:
    """Return the report as text; readers: ranks x loader workers."""
    return "\n".join(lines(report, max_bad, readers))


def lines(report: Report, max_bad: float, readers: int) -> Iterator[str]:
    """Yield the lines of the report: contents, readers, troubles, verdict."""
    findings = report.found
    counts = findings.counts
    shards = len(report.sizes)

    # Contents: sizes and shares over all samples that were read.
    where = "" if report.looked == shards else f" in the {report.looked:,} shards looked at"
    size = human_bytes(sum(report.sizes))
    samples = counted(counts["seen"], "sample")
    yield f"{report.folder}: {counted(shards, 'shard')}, {size}, {samples}{where}"
    if counts["read"]:
        read = counted(counts["read"], "sample")
        yield f"  read         {read}; below: smallest / median / largest"
        yield f"  shards       {spread(findings.per_shard)} samples"
        yield f"  captions     {spread(findings.words)} words"
        widths = spread(findings.widths)
        heights = spread(findings.heights)
        yield f"  images       {widths} pixels wide, {heights} high; {shares(findings.kinds)}"

    # Index and readers.
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

    # Troubles, with the first samples of each kind.
    for kind, name, consequence in TROUBLES:
        share = ""
        if counts[kind]:
            share = f" ({counts[kind] / counts['read']:.2%}){consequence}"
        yield f"  {name:12} {counted(counts[kind], 'sample')}{share}"
        yield from named(getattr(findings, kind), counts[kind])
    for why in sorted(findings.refused):
        yield f"  refused      {why}"
    for why in sorted(findings.stale):
        yield f"  stale        {why}"

    # Verdict.
    faults = report.faults(max_bad)
    if faults:
        yield f"not ready: {'; '.join(faults)}"
    else:
        yield f"ready: train with --set data.train={report.folder}"


# field of Found, name, consequence
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
    """Return a description of the index's state."""
    if not report.indexed:
        return f"none yet; the first run makes it, or: python run/prepare.py index {report.folder}"
    return "stale" if report.found.stale else "up to date"


def named(examples: list[str], total: int) -> Iterator[str]:
    """Yield a line for each of the first NAMED examples, and the number of others."""
    for example in examples[:NAMED]:
        yield f"               {example}"
    if total > NAMED:
        yield f"               ... and {total - NAMED:,} more"


def spread(values: Counter) -> str:
    """Return 'min / median / max' of {value: how often}."""
    ordered = sorted(values)
    if not ordered:
        return "-"
    middle = (values.total() - 1) // 2
    seen = 0
    for median in ordered:
        seen += values[median]
        if seen > middle:
            break
    return f"{ordered[0]:,} / {median:,} / {ordered[-1]:,}"


def shares(values: Counter) -> str:
    """Return the share of each value, the most common first: 'jpg 75.0%, png 25.0%'."""
    total = values.total()
    return ", ".join(f"{name} {number / total:.1%}" for name, number in values.most_common())


def counted(number: int, what: str) -> str:
    """Return '1 shard', '2,000 shards'."""
    plural = "" if number == 1 else "s"
    return f"{number:,} {what}{plural}"


def human_bytes(number: int) -> str:
    """Return a size such as '999 bytes' or '1.2 GB'."""
    power = min(4, (len(str(number)) - 1) // 3)
    if power == 0:
        return f"{number} bytes"
    unit = ("bytes", "kB", "MB", "GB", "TB")[power]
    return f"{number / 1000**power:.1f} {unit}"
