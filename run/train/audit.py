"""What went into a run: broken samples and, where data.trace asks, every sample's key."""

import json
from pathlib import Path

from glimpse.data.loader import Batches, DataConfig
from glimpse.data.stream import Stream


class Audit:
    """What went into the run: broken samples, named once each in the log and counted; every
    sample's key, where data.trace asks.

    Raises ValueError when this rank's share of broken samples passes data.max_bad (of at least
    1,000 seen).
    """

    def __init__(self, home: Path, rank: int, cfg: DataConfig, say):
        self.cfg, self.say, self.seen, self.bad, self.named = cfg, say, 0, 0, set()
        self.trace = None
        if cfg.trace:
            self.trace = (home / "trace" / f"rank-{rank}.jsonl").open("a", buffering=1)

    def __call__(self, batches: Batches | Stream, parts: list[dict], samples: int) -> None:
        for part in parts:
            self.seen += len(part["samples"])
            self.bad += len(part["bad"])
            for shard, key, why in part["bad"]:
                if (shard, key) not in self.named:
                    self.named.add((shard, key))
                    self.say(f"skipped {shard} {key}: {why}")
            if self.trace:
                self.trace.write(json.dumps(dict(samples=samples, keys=batches.keys(part))) + "\n")
        if self.bad > self.cfg.max_bad * max(self.seen, 1000):
            last = parts[-1]["bad"][-1] if parts[-1]["bad"] else sorted(self.named)[-1]
            raise ValueError(
                f"data.max_bad: {self.bad} of {self.seen} samples could not be read, more than"
                f" {self.cfg.max_bad:.1%}; the last: {' '.join(last)};"
                " run: run/prepare.py check DIR"
            )
