"""The samples of a run: broken ones, and the key of every sample if data.trace is set."""

import json
from collections.abc import Callable
from pathlib import Path

from glimpse.data.loader import Batches, DataConfig, MicroBatch
from glimpse.data.stream import Stream


class Audit:
    """Counts broken samples, names each once in the log, and writes the trace.

    The trace, if data.trace is set, has the key of every sample.

    Raises ValueError when this rank's share of broken samples passes data.max_bad (of at least
    1,000 seen).
    """

    def __init__(self, home: Path, rank: int, cfg: DataConfig, say: Callable[[str], None]):
        self.cfg = cfg
        self.say = say
        self.seen = 0
        self.bad = 0
        self.named: set[tuple[str, str]] = set()  # (shard, key) of the broken samples in the log
        self.trace = None
        if cfg.trace:
            self.trace = (home / "trace" / f"rank-{rank}.jsonl").open("a", buffering=1)

    def __call__(self, batches: Batches | Stream, parts: list[MicroBatch], samples: int) -> None:
        for part in parts:
            self.seen += len(part["samples"])
            self.bad += len(part["bad"])
            for shard, key, why in part["bad"]:
                if (shard, key) not in self.named:
                    self.named.add((shard, key))
                    self.say(f"skipped {shard} {key}: {why}")
            if self.trace:
                record = dict(samples=samples, keys=batches.keys(part))
                self.trace.write(json.dumps(record) + "\n")
        if self.bad > self.cfg.max_bad * max(self.seen, 1000):
            raise ValueError(
                f"data.max_bad: {self.bad} of {self.seen} samples could not be read, more than"
                f" {self.cfg.max_bad:.1%}; the last: {self.last(parts)};"
                " run: run/prepare.py check DIR"
            )

    def last(self, parts: list[MicroBatch]) -> str:
        """Describe a broken sample: the last of the last part, or one that was named before."""
        bad = parts[-1]["bad"]
        if bad:
            return " ".join(bad[-1])
        return " ".join(max(self.named))
