"""Training from shards that cannot be indexed (URLs and pipes), which webdataset reads in order.

`data.train: "https://host/{00000..00099}.tar"` or `"pipe:aws s3 cp s3://.../{0000..0099}.tar -"`
selects this loader instead of the indexed one in data/loader.py.

The shards of all epochs form one sequence; each epoch has another order. Reader r of R (ranks x
workers) reads shards r, r + R, r + 2 R, ... of the sequence, and mixes their samples in a buffer.
The order of the shards depends on (seed, epoch). The order of the samples also depends on the
rank, the number of workers and where the run was resumed. The crops and masks of a sample depend
on (seed, epoch, name of the shard, key), like those of indexed shards on (seed, epoch, sample).

A resumed run starts at the oldest shard that some reader had not used up: every sample is seen at
least once, some of them twice. For exactly once, on any number of ranks, use local shards with an
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

SHUFFLE_BUFFER = 1000  # samples in the buffer in which a reader mixes its shards


def is_url(path: str) -> bool:
    """Return True if webdataset must open this path, rather than the file system."""
    return "://" in path or path.startswith("pipe:")


def open_url(url: str):
    """Open a URL or the output of a pipe for reading.

    Closing the file raises an error if the transfer failed.
    """
    return webdataset.gopen(url)


def is_stream(train: tuple[str, ...]) -> bool:
    """Return True if the paths of data.train are streams.

    Raise ValueError if there are both streams and folders.
    """
    streams = [path for path in train if is_url(path)]
    folders = [path for path in train if not is_url(path)]
    if streams and folders:
        raise ValueError(
            f"data.train: {streams[0]} is a stream and {folders[0]} a folder; give one kind"
        )
    return bool(streams)


class Stream(IterableDataset):
    """One rank's share of every global batch from streamed shards.

    cursor: the index of the shard, in the sequence of all epochs, at which to start.
    """

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
        self.reader = reader
        self.rank = rank
        self.world_size = world_size
        self.cursor = cursor
        self.urls = [url for path in train for url in webdataset.shardlists.expand_urls(path)]
        self.micro_batch_size = micro_batch_size(batch, world_size, accumulate)
        self.accumulate = accumulate
        # For each worker, the oldest shard of which it still holds or will read samples.
        self.oldest_needed = [cursor] * max(1, reader.cfg.workers)
        readers = world_size * max(1, reader.cfg.workers)
        if len(self.urls) < readers:
            raise ValueError(
                f"data.train: {len(self.urls)} streamed shards for {readers} readers (ranks x"
                " data.workers); give more shards or fewer workers"
            )

    def __len__(self) -> int:
        raise TypeError("the length of a stream is unknown")

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        info = get_worker_info()
        workers, worker = (info.num_workers, info.id) if info else (1, 0)
        bad: list[BadSample] = []
        samples = self.prepared_samples(workers, worker, bad)
        while True:
            micro_batches = []
            for _ in range(self.accumulate):
                oldest, prepared, keys = zip(*islice(samples, self.micro_batch_size))
                micro_batch = self.reader.collate(list(prepared), list(bad))
                micro_batch["keys"] = keys
                micro_batch["worker"] = worker
                micro_batch["oldest"] = oldest[-1]
                micro_batches.append(micro_batch)
                bad.clear()
            yield micro_batches

    def prepared_samples(
        self, workers: int, worker: int, bad: list[BadSample]
    ) -> Iterator[tuple[int, PreparedSample, tuple[int, str, str]]]:
        """Yield (oldest shard in the buffer, prepared sample, its key) without end.

        Unreadable samples are appended to `bad`, and skipped.
        """
        rng = np.random.default_rng((self.reader.seed, self.cursor, self.rank, worker))
        buffer: list[tuple[Sample, int, int]] = []
        failures = 0
        reader = self.rank * workers + worker
        readers = self.world_size * workers
        for newest in self.samples(reader, readers, bad):
            # 1. Fill the buffer. Once it is full, each new sample replaces a random one.
            buffer.append(newest)
            if len(buffer) < SHUFFLE_BUFFER:
                continue
            i = int(rng.integers(len(buffer)))
            buffer[i], buffer[-1] = buffer[-1], buffer[i]
            sample, epoch, _ = buffer.pop()

            # 2. Prepare the sample. A stream has no sample numbers: a checksum of the shard's name
            #    and the key replaces it in the seeds.
            number = zlib.crc32(f"{sample.shard}/{sample.key}".encode())
            try:
                prepared = self.reader.prepare(sample, epoch, number)
            except (ValueError, OSError) as error:
                bad.append((sample.shard, sample.key, " ".join(str(error).split())))
                failures += 1
                # So many failures in a row are not single broken files.
                if failures == MAX_SUBSTITUTES:
                    raise ValueError(
                        f"data.train: {failures} samples in a row cannot be read, the last"
                        f" {' '.join(bad[-1])}"
                    ) from None
                continue
            failures = 0

            # 3. Resuming must start at the oldest shard in the buffer to see all of its samples.
            oldest = min((shard_index for _, _, shard_index in buffer), default=newest[2])
            yield oldest, prepared, (epoch, sample.shard, sample.key)

    def samples(
        self, reader: int, readers: int, bad: list[BadSample]
    ) -> Iterator[tuple[Sample, int, int]]:
        """Yield (sample, epoch, shard index in the sequence) of the shards of one reader.

        Shards that cannot be read to their end are recorded in `bad`. Raise ValueError if many
        shards in a row yield no sample.
        """
        empty_shards = 0
        for shard_index in count(self.cursor + reader, readers):
            epoch, position = divmod(shard_index, len(self.urls))
            order = np.random.default_rng((self.reader.seed, epoch)).permutation(len(self.urls))
            url = self.urls[order[position]]
            name = url.rstrip(" -").rpartition("/")[2]

            samples_read = 0
            try:
                for sample in read_shard(url, name):
                    samples_read += 1
                    yield sample, epoch, shard_index
            # Transfers and truncated tars raise different errors in each of the libraries.
            except Exception as error:
                bad.append((name, f"after {samples_read} samples", " ".join(str(error).split())))

            # Without this limit a reader would retry forever while its server is down, and all
            # other ranks would wait.
            empty_shards = 0 if samples_read else empty_shards + 1
            if empty_shards == min(MAX_SUBSTITUTES, len(self.urls)):
                reason = bad[-1][2] if bad else "empty shards"
                raise ValueError(
                    f"data.train: {empty_shards} streamed shards in a row yielded no samples, the"
                    f" last {url}: {reason}"
                )

    def keys(self, micro_batch: MicroBatch) -> list[tuple[int, str, str]]:
        """Return (epoch, shard, key) of each sample of a micro-batch."""
        # DataLoader's default_convert turns the tuples into lists.
        return [(epoch, shard, key) for epoch, shard, key in micro_batch["keys"]]

    def iterate(self, starts: range, pin_memory: bool) -> Iterator[list[MicroBatch]]:
        """Yield one batch for each element of `starts`; worker processes prefetch them.

        The values of `starts` have no effect. pin_memory: copy the tensors to page-locked memory,
        for a GPU.
        """
        workers = worker_kwargs(self.reader.cfg)
        batches = iter(DataLoader(self, batch_size=None, pin_memory=pin_memory, **workers))
        for _ in starts:
            micro_batches = next(batches)
            last = micro_batches[-1]
            self.oldest_needed[last["worker"]] = last["oldest"]
            yield micro_batches

    def fingerprint(self) -> dict:
        """Return everything that determines the order of the shards.

        A run can only be resumed if its fingerprint is unchanged.
        """
        return dict(seed=self.reader.seed, shards=f"{zlib.crc32(repr(self.urls).encode()):08x}")

    def seek(self, cursor: int) -> None:
        """Start at this shard of the sequence."""
        self.cursor = cursor
        self.oldest_needed = [cursor] * len(self.oldest_needed)

    def resume_cursor(self) -> int:
        """Return the shard from which to resume after the last batch that `iterate` yielded.

        No worker of this rank needs an earlier shard.
        """
        return min(self.oldest_needed)


def read_shard(url: str, name: str) -> Iterator[Sample]:
    """Yield the samples of one streamed shard."""
    shards = webdataset.SimpleShardList([url])
    for members in webdataset.DataPipeline(shards, webdataset.tarfile_to_samples()):
        files = {
            split_name(f"x.{extension}")[1]: data
            for extension, data in members.items()
            if isinstance(data, bytes)
        }
        yield Sample(name, members["__key__"], files)
