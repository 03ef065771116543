"""Training from shards that cannot be indexed (URLs, pipes), read from front to back by webdataset.

`data.train: "https://host/{00000..00099}.tar"` or `"pipe:aws s3 cp s3://.../{0000..0099}.tar -"`
comes here instead of data/loader.py's index. The shards of all epochs form one sequence, each
epoch in an order of its own; reader r of R (ranks x workers) takes every R-th.

A resumed run begins at the first shard that some reader had not used up: every sample is seen at
least once, some of them again. For exactly once, on any number of ranks, use local shards with an
index.
"""

import zlib
from collections.abc import Iterator
from itertools import count, islice

import numpy as np
import webdataset
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from glimpse.data.loader import (
    MAX_SUBSTITUTES,
    BadSample,
    MicroBatch,
    PreparedSample,
    SampleReader,
    micro_batch_size,
    worker_kwargs,
)
from glimpse.data.shards import Sample, split_name

SHUFFLE_BUFFER = 1000  # samples that a reader mixes


def is_url(path: str) -> bool:
    """Return True if webdataset reads this, and not the file system."""
    return "://" in path or path.startswith("pipe:")


def open_url(url: str):
    """A file at a URL or the output of a pipe, open for reading; closing it raises where the
    transfer failed.
    """
    return webdataset.gopen(url)


def is_stream(train: tuple[str, ...]) -> bool:
    """Return True if these name streams; ValueError where folders and streams are mixed."""
    streams = [path for path in train if is_url(path)]
    folders = [path for path in train if not is_url(path)]
    if streams and folders:
        raise ValueError(
            f"data.train: {streams[0]} is a stream and {folders[0]} a folder; give one kind"
        )
    return bool(streams)


class Stream(IterableDataset):
    """One rank's batches from streamed shards; `cursor`: the sequence begins at this shard."""

    def __init__(
        self,
        reader: SampleReader,
        train: tuple[str, ...],
        *,
        batch: int,
        accumulate: int = 1,
        rank: int = 0,
        world_size: int = 1,
        cursor: int = 0,
    ):
        self.reader, self.rank, self.world, self.cursor = reader, rank, world_size, cursor
        self.urls = [url for path in train for url in webdataset.shardlists.expand_urls(path)]
        self.size = micro_batch_size(batch, world_size, accumulate)
        self.accumulate = accumulate
        # by worker: the oldest shard that it still needs
        self.oldest_needed = [cursor] * max(1, reader.cfg.workers)
        readers = world_size * max(1, reader.cfg.workers)
        if len(self.urls) < readers:
            raise ValueError(
                f"data.train: {len(self.urls)} streamed shards for {readers} readers (ranks x"
                " data.workers); give more shards or fewer workers"
            )

    def __len__(self) -> int:
        raise TypeError("a stream does not know its samples")

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        info = get_worker_info()
        workers, worker = (info.num_workers, info.id) if info else (1, 0)
        bad: list[BadSample] = []
        rows = self.rows(workers, worker, bad)
        while True:
            parts = []
            for _ in range(self.accumulate):
                oldest, mixed, keys = zip(*islice(rows, self.size))
                part = self.reader.micro_batch(list(mixed), list(bad))
                part["keys"] = keys
                part["worker"] = worker
                part["oldest"] = oldest[-1]
                parts.append(part)
                bad.clear()
            yield parts

    def rows(
        self, workers: int, worker: int, bad: list[BadSample]
    ) -> Iterator[tuple[int, PreparedSample, tuple[int, str, str]]]:
        """Yield (oldest shard still in the buffer, row, key) without end; what cannot be read goes
        to `bad`.
        """
        rng = np.random.default_rng((self.reader.seed, self.cursor, self.rank, worker))
        buffer: list[tuple[Sample, int, int]] = []
        failed = 0
        reader, readers = self.rank * workers + worker, self.world * workers
        for newest in self.samples(reader, readers, bad):
            # 1. Fill the buffer, then exchange a random sample of it for each new one.
            buffer.append(newest)
            if len(buffer) < SHUFFLE_BUFFER:
                continue
            i = int(rng.integers(len(buffer)))
            buffer[i], buffer[-1] = buffer[-1], buffer[i]
            sample, epoch, _ = buffer.pop()

            # 2. Read it; many failures in a row are no accident.
            number = zlib.crc32(f"{sample.shard}/{sample.key}".encode())
            try:
                row = self.reader.prepare(sample, epoch, number)
            except (ValueError, OSError) as error:
                bad.append((sample.shard, sample.key, " ".join(str(error).split())))
                failed += 1
                if failed == MAX_SUBSTITUTES:
                    raise ValueError(
                        f"data.train: {failed} samples in a row cannot be read, the last"
                        f" {' '.join(bad[-1])}"
                    ) from None
                continue
            failed = 0
            oldest = min((ordinal for _, _, ordinal in buffer), default=newest[2])
            yield oldest, row, (epoch, sample.shard, sample.key)

    def samples(
        self, reader: int, readers: int, bad: list[BadSample]
    ) -> Iterator[tuple[Sample, int, int]]:
        """Yield (sample, epoch, shard's place in the sequence) of this reader's shards; ValueError
        where one after another is empty.
        """
        empty = 0
        for ordinal in count(self.cursor + reader, readers):
            epoch, place = divmod(ordinal, len(self.urls))
            order = np.random.default_rng((self.reader.seed, epoch)).permutation(len(self.urls))
            url = self.urls[order[place]]
            name = url.rstrip(" -").rpartition("/")[2]
            found = 0
            try:
                for sample in read_shard(url, name):
                    found += 1
                    yield sample, epoch, ordinal
            # a transfer or a tar that breaks off, in whatever way its library says so
            except Exception as error:
                bad.append((name, f"after {found} samples", " ".join(str(error).split())))
            empty = 0 if found else empty + 1
            # A server that is down would be asked forever, while the ranks wait.
            if empty == min(MAX_SUBSTITUTES, len(self.urls)):
                why = bad[-1][2] if bad else "empty shards"
                raise ValueError(
                    f"data.train: {empty} streamed shards in a row gave nothing, the last {url}:"
                    f" {why}"
                )

    def keys(self, part: MicroBatch) -> list[tuple[int, str, str]]:
        """(epoch, shard, key) of each sample of a micro-batch."""
        # the loader makes lists of tuples
        return [(epoch, shard, key) for epoch, shard, key in part["keys"]]

    def iterate(self, starts: range, pin_memory: bool) -> Iterator[list[MicroBatch]]:
        """Yield as many batches as `starts` names."""
        batches = iter(
            DataLoader(
                self, batch_size=None, pin_memory=pin_memory, **worker_kwargs(self.reader.cfg)
            )
        )
        for _ in starts:
            parts = next(batches)
            self.oldest_needed[parts[-1]["worker"]] = parts[-1]["oldest"]
            yield parts

    def fingerprint(self) -> dict:
        """Everything that the order of the shards follows from: a run that is resumed must have the
        same.
        """
        return dict(seed=self.reader.seed, shards=f"{zlib.crc32(repr(self.urls).encode()):08x}")

    def seek(self, cursor: int) -> None:
        """Go on from that shard of the sequence."""
        self.cursor, self.oldest_needed = cursor, [cursor] * len(self.oldest_needed)

    def resume_cursor(self) -> int:
        """The cursor for going on from the last batch that `stream` gave: no reader of this rank
        needs an earlier shard.
        """
        return min(self.oldest_needed)


def read_shard(url: str, name: str) -> Iterator[Sample]:
    """Yield the samples of one streamed shard."""
    shards = webdataset.SimpleShardList([url])
    for parts in webdataset.DataPipeline(shards, webdataset.tarfile_to_samples()):
        files = {
            split_name(f"x.{extension}")[1]: data
            for extension, data in parts.items()
            if isinstance(data, bytes)
        }
        yield Sample(name, parts["__key__"], files)
