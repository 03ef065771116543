"""Account for a run's samples: unreadable ones, and with data.trace the key of every sample."""

import json
from collections.abc import Callable
from pathlib import Path

from glimpse.data.loader import Batches, DataConfig, MicroBatch
from glimpse.data.stream import Stream


class Audit:
    """Count and report unreadable samples, and write the trace.

    With data.trace, RUN/trace/rank-R.jsonl gets the keys of all samples of this rank.
    """

    def __init__(self, run_folder: Path, rank: int, cfg: DataConfig, warn: Callable[[str], None]):
        """Open the trace file if data.trace is set. warn: prints a message."""
        self.cfg = cfg
        self.warn = warn
        self.sample_count = 0
        self.bad_count = 0
        self.reported: set[tuple[str, str]] = set()  # (shard, key)
        self.trace = None
        if cfg.trace:
            self.trace = (run_folder / "trace" / f"rank-{rank}.jsonl").open("a", buffering=1)

    def __call__(
        self, batches: Batches | Stream, micro_batches: list[MicroBatch], samples: int
    ) -> None:
        """Record this rank's share of a batch, after which `samples` samples have been seen.

        Raises ValueError if the share of unreadable samples exceeds data.max_bad. It is a share of
        at least 1,000 samples, so that a few at the start do not end the run.
        """
        for micro_batch in micro_batches:
            self.sample_count += len(micro_batch["samples"])
            self.bad_count += len(micro_batch["bad"])
            # Each sample is reported once, not in every epoch.
            for shard, key, reason in micro_batch["bad"]:
                if (shard, key) not in self.reported:
                    self.reported.add((shard, key))
                    self.warn(f"skipped {shard} {key}: {reason}")
            if self.trace:
                record = dict(samples=samples, keys=batches.keys(micro_batch))
                self.trace.write(json.dumps(record) + "\n")

        if self.bad_count > self.cfg.max_bad * max(self.sample_count, 1000):
            raise ValueError(
                f"data.max_bad: {self.bad_count} of {self.sample_count} samples could not be read,"
                f" more than {self.cfg.max_bad:.1%}; the last: {self.last_error(micro_batches)};"
                " find them with `run/prepare.py check DIR`, or raise data.max_bad"
            )

    def last_error(self, micro_batches: list[MicroBatch]) -> str:
        """Describe an unreadable sample: the newest if there is one in the last micro-batch."""
        bad = micro_batches[-1]["bad"]
        if bad:
            return " ".join(bad[-1])
        return " ".join(max(self.reported))
