"""What DeepSpeed 0.19.8 keeps on a rank, and sends, for a ZeRO stage: weights, fp32 copies,
moments, gradients, buffers.

    zero = Zero.of(json.loads(text))
    zero.held(weights, ranks), zero.in_step(weights, ranks, ADAM["gpu"])        {what: bytes}

Read off its sources and checked by run/bench_plan.py, not what the papers promise: ZeRO-1 holds all
gradients until the backward pass is over, the optimizer's temporaries are as large as what it steps
at once, and ZeRO-3 keeps gathered weights by stage3_max_reuse_distance (stage3_max_live_parameters
only bounds prefetching). All sizes are in bytes, counts in parameters.
"""

from dataclasses import dataclass

import torch

from glimpse.model import ema
from glimpse.run.lib.config import Run
from glimpse.run.train import optim

FLOAT = 4  # bytes of fp32
# fp32 temporaries of torch's AdamW, in sizes of what it steps at once: one tensor after another, or
# foreach
ADAM = {"cpu": 2, "gpu": 1}


@dataclass(frozen=True)
class Weights:
    """Counts of a method's parameters."""

    trained: int
    frozen: int
    averaged: int  # of the frozen ones, those that follow the student
    small: int  # of the trained, those that ZeRO-3 does not shard in use
    largest: int  # trained parameter
    group: int  # of the optimizer, the largest

    @property
    def all(self) -> int:
        return self.trained + self.frozen

    @classmethod
    def of(cls, method: torch.nn.Module, cfg: Run, threshold: int) -> "Weights":
        trained = [p.numel() for p in method.parameters() if p.requires_grad]
        groups = [
            sum(p.numel() for p in group["params"]) for group in optim.groups(method, cfg.optim)
        ]
        averaged = sum(teacher.numel() for teacher, _ in ema.parameters(method.averaged()).values())
        frozen = sum(p.numel() for p in method.parameters() if not p.requires_grad)
        return cls(
            sum(trained),
            frozen,
            averaged,
            sum(n for n in trained if n < threshold),
            max(trained),
            max(groups),
        )


@dataclass(frozen=True)
class Zero:
    """The part of a DeepSpeed JSON that decides on memory; DeepSpeed's defaults where it is
    silent.
    """

    stage: int
    bf16: bool
    buckets: int  # elements of gradients that are sent together, all buffers
    threshold: int
    reuse: int
    prefetch: int
    sub_group: int
    offload: bool  # fp32 copies, moments and gradients in the host's memory
    offload_weights: bool

    @classmethod
    def of(cls, tree: dict) -> "Zero":
        """Of a DeepSpeed JSON as run/train/engine.py reads it."""
        zero = tree.get("zero_optimization", {})
        stage = zero.get("stage", 0)
        bucket = (
            int(zero.get("reduce_bucket_size", 5e8))
            if zero.get("contiguous_gradients", True)
            else 0
        )
        away = [
            zero.get(f"offload_{what}", {}).get("device", "none") != "none"
            for what in ("optimizer", "param")
        ]
        return cls(
            stage,
            bool(tree.get("bf16", {}).get("enabled")),
            bucket * (2 if stage in (1, 2) and zero.get("overlap_comm") else 1),
            int(zero.get("stage3_param_persistence_threshold", 1e5)),
            int(zero.get("stage3_max_reuse_distance", 1e9)),
            int(zero.get("stage3_prefetch_bucket_size", 5e7)),
            int(zero.get("sub_group_size", 1e9)),
            *away,
        )

    @property
    def bytes(self) -> int:
        """Of a weight or gradient as it is computed with and sent."""
        return 2 if self.bf16 else FLOAT

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.bf16 else torch.float32

    def held(self, w: Weights, ranks: int) -> dict[str, float]:
        """What stays from step to step."""
        share = 1 / ranks if self.stage == 3 else 1
        own = 0 if self.offload else w.trained / ranks
        found = {"weights": 0 if self.offload_weights else self.bytes * w.all * share}
        if self.stage == 0:
            found["moments"] = 2 * FLOAT * w.trained
        else:
            found |= {"fp32 weights": FLOAT * own, "moments": 2 * FLOAT * own}
        if w.averaged:
            found["average"] = (FLOAT if self.bf16 else 0) * w.averaged * share
        if self.stage == 3:
            # one rank's shards are whole, and gathering them copies nothing
            small = 0 if ranks == 1 else self.bytes * w.small
            found |= {
                "gradients": self.bytes * own,
                "buckets": self.bytes * self.buckets,
                "small weights": small,
            }
        return found

    def kept(self, w: Weights, accumulate: int, checkpointing: bool) -> float:
        """How many sharded weights ZeRO-3 keeps whole between two uses: those whose next use is
        nearer than `reuse`.

        The way there is counted in parameters: to a weight's backward pass there and back, with
        recomputation once more. With parts the record of which module follows which is never
        complete, and nothing is kept or prefetched.
        """
        return (
            0.0
            if accumulate > 1
            else min(w.all - w.small, self.reuse / (3 if checkpointing else 2))
        )

    def in_backward(
        self, w: Weights, ranks: int, accumulate: int, checkpointing: bool
    ) -> dict[str, float]:
        """What stands beside activations, and the gradient that is just being computed."""
        if self.stage == 3:
            ahead = (
                self.kept(w, accumulate, checkpointing) + self.prefetch
                if accumulate == 1
                else 2 * w.largest
            )
            gathered = min(w.all - w.small, ahead) * (ranks > 1)
            # A full bucket is copied to be sent.  By then activations that are not computed again
            # have made room for it.
            sent = min(self.buckets, w.trained) * checkpointing
            return {"gathered weights": self.bytes * gathered, "gradients sent": self.bytes * sent}
        own = (
            {"gradients": 0 if self.offload else self.bytes * w.trained / ranks}
            if self.stage == 2
            else {}
        )
        return {**own, "buckets": self.bytes * self.buckets} if self.stage else {}

    @property
    def keeps_gradients(self) -> bool:
        """Does each parameter's gradient stay until the backward pass is over?"""
        return self.stage < 2

    def after_backward(
        self, w: Weights, ranks: int, accumulate: int, checkpointing: bool
    ) -> dict[str, float]:
        """What stands while the last gradients are sent, when the activations are gone."""
        if self.stage == 0:
            return {
                "gradients": self.bytes * w.trained,
                "all-reduce": self.bytes * min(w.trained, 5e8),
            }
        if self.stage == 1:
            own = 0 if self.offload else self.bytes * w.trained / ranks
            return {"gradients": self.bytes * w.trained + own, "buckets": self.bytes * self.buckets}
        if self.stage == 3:  # of the last ones, with the largest
            gathered = self.in_backward(w, ranks, accumulate, checkpointing)
            return {
                **gathered,
                "gradients sent": (
                    self.bytes * (w.largest + min(self.buckets, w.trained) * (1 + 1 / ranks))
                ),
            }
        return {}

    def in_step(self, w: Weights, ranks: int, temporaries: int) -> dict[str, float]:
        """What stands while the optimizer steps; temporaries: a value of ADAM."""
        if self.offload:
            return {}
        if self.stage == 0:
            return {
                "gradients": FLOAT * w.trained,
                "optimizer's temporaries": temporaries * FLOAT * w.largest,
            }
        at_once = min(w.group / ranks, self.sub_group) if self.stage == 3 else w.group / ranks
        kept = {} if self.stage == 3 else {"gradients": self.bytes * w.trained / ranks}
        return {
            **kept,
            "fp32 gradients": FLOAT * at_once,
            "optimizer's temporaries": temporaries * FLOAT * at_once,
        }

    def sent(
        self, w: Weights, ranks: int, accumulate: int, checkpointing: bool
    ) -> dict[str, float]:
        """Bytes of weights and gradients that a rank sends in a step, by collectives that send each
        byte once (rings).
        """
        once = (ranks - 1) / ranks * self.bytes
        if self.stage == 3:
            # GradCache: a forward pass more for each part
            sharded, uses = w.all - w.small, 2 if accumulate == 1 else 3 * accumulate
            again = (uses - 1) * (sharded - self.kept(w, accumulate, checkpointing))
            return {
                "gather weights": once * (sharded + again + w.small),
                "scatter gradients": once * w.trained * accumulate,
            }
        if self.stage == 0:
            return {"all-reduce gradients": 2 * once * w.trained}
        times = accumulate if self.stage == 2 else 1
        return {
            "all-reduce gradients": 2 * once * w.trained * times,
            "gather weights": once * w.trained,
        }
