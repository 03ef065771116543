"""Bytes that DeepSpeed 0.19.8 keeps on a rank, and sends, for a ZeRO stage.

    zero = Zero.of(json.loads(text))
    zero.held(weights, ranks), zero.in_step(weights, ranks, ADAM["gpu"])        {holder: bytes}

The holders are weights, fp32 copies, moments, gradients and buffers. The formulas follow the
sources of DeepSpeed and are checked by run/bench_plan.py. They differ from the papers: ZeRO-1 holds
all gradients until the backward pass is over, the optimizer's temporaries are as large as the
tensors that it steps at once, and ZeRO-3 keeps gathered weights by stage3_max_reuse_distance
(stage3_max_live_parameters only bounds prefetching).
All sizes are in bytes, counts in parameters.
"""

from dataclasses import dataclass

import torch

from glimpse.model import ema
from glimpse.run.lib.config import RunConfig
from glimpse.run.train import optim

FLOAT = 4  # bytes of fp32
# fp32 temporaries of torch's AdamW, in sizes of the tensors that it steps at once: one tensor after
# another, or foreach.
ADAM = {"cpu": 2, "gpu": 1}


@dataclass(frozen=True)
class Weights:
    """Counts of a method's parameters."""

    trained: int
    frozen: int
    averaged: int  # frozen parameters that follow the student
    small: int  # trained parameters that ZeRO-3 does not shard in use
    largest: int  # the largest trained parameter
    group: int  # the largest group of the optimizer

    @property
    def all(self) -> int:
        return self.trained + self.frozen

    @classmethod
    def of(cls, method: torch.nn.Module, cfg: RunConfig, threshold: int) -> "Weights":
        """Count the parameters of a method; those below `threshold` are small."""
        trained = [p.numel() for p in method.parameters() if p.requires_grad]
        frozen = [p.numel() for p in method.parameters() if not p.requires_grad]
        groups = optim.groups(method, cfg.optim)
        group_sizes = [sum(p.numel() for p in group["params"]) for group in groups]
        averages = [teacher.numel() for teacher, _ in ema.parameters(method.ema_pairs()).values()]
        small = [size for size in trained if size < threshold]
        return cls(
            trained=sum(trained),
            frozen=sum(frozen),
            averaged=sum(averages),
            small=sum(small),
            largest=max(trained),
            group=max(group_sizes),
        )


@dataclass(frozen=True)
class Zero:
    """The settings of a DeepSpeed JSON that determine memory, with DeepSpeed's defaults."""

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
        """Read the settings of a DeepSpeed JSON, as run/train/engine.py loads it."""
        zero = tree.get("zero_optimization", {})
        stage = zero.get("stage", 0)
        buckets = 0
        if zero.get("contiguous_gradients", True):
            buckets = int(zero.get("reduce_bucket_size", 5e8))
        if stage in (1, 2) and zero.get("overlap_comm"):
            buckets *= 2
        return cls(
            stage=stage,
            bf16=bool(tree.get("bf16", {}).get("enabled")),
            buckets=buckets,
            threshold=int(zero.get("stage3_param_persistence_threshold", 1e5)),
            reuse=int(zero.get("stage3_max_reuse_distance", 1e9)),
            prefetch=int(zero.get("stage3_prefetch_bucket_size", 5e7)),
            sub_group=int(zero.get("sub_group_size", 1e9)),
            offload=zero.get("offload_optimizer", {}).get("device", "none") != "none",
            offload_weights=zero.get("offload_param", {}).get("device", "none") != "none",
        )

    @property
    def bytes(self) -> int:
        """The size of a weight or gradient in computation and communication."""
        return 2 if self.bf16 else FLOAT

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.bf16 else torch.float32

    def held(self, w: Weights, ranks: int) -> dict[str, float]:
        """Return the bytes that stay from step to step."""
        share = 1 / ranks if self.stage == 3 else 1
        shard = 0 if self.offload else w.trained / ranks  # of the optimizer's states
        held = {"weights": 0 if self.offload_weights else self.bytes * w.all * share}
        if self.stage == 0:
            held["moments"] = 2 * FLOAT * w.trained
        else:
            held["fp32 weights"] = FLOAT * shard
            held["moments"] = 2 * FLOAT * shard
        if w.averaged:
            # With bf16, an fp32 copy beside the teacher's weights.
            held["average"] = FLOAT * w.averaged * share if self.bf16 else 0
        if self.stage == 3:
            held["gradients"] = self.bytes * shard
            held["buckets"] = self.bytes * self.buckets
            # A single rank has full shards, and gathering them copies nothing.
            held["small weights"] = 0 if ranks == 1 else self.bytes * w.small
        return held

    def kept(self, w: Weights, accumulate: int, checkpointing: bool) -> float:
        """Return the number of sharded weights that ZeRO-3 keeps gathered between two uses.

        It keeps a weight whose next use is nearer than `reuse`. The distance is counted in
        parameters: through the weights above it and back to its backward pass, and with
        recomputation once more.
        With micro-batches DeepSpeed's record of the order of modules is never complete, and nothing
        is kept or prefetched.
        """
        if accumulate > 1:
            return 0.0
        passes = 3 if checkpointing else 2
        return min(w.all - w.small, self.reuse / passes)

    def in_backward(
        self, w: Weights, ranks: int, accumulate: int, checkpointing: bool
    ) -> dict[str, float]:
        """Return the bytes beside the activations and the gradient that is being computed."""
        if self.stage == 0:
            return {}
        if self.stage == 3:
            gathered: float = 0
            if ranks > 1:
                ahead = self.gathered_ahead(w, accumulate, checkpointing)
                gathered = min(w.all - w.small, ahead)
            # A full bucket is copied to be sent. Without checkpointing, activations have been freed
            # by then and make room for it.
            sent = min(self.buckets, w.trained) if checkpointing else 0
            return {"gathered weights": self.bytes * gathered, "gradients sent": self.bytes * sent}

        held: dict[str, float] = {}
        if self.stage == 2:
            held["gradients"] = 0 if self.offload else self.bytes * w.trained / ranks
        held["buckets"] = self.bytes * self.buckets
        return held

    def gathered_ahead(self, w: Weights, accumulate: int, checkpointing: bool) -> float:
        """Return the number of weights that ZeRO-3 holds gathered, if there are that many."""
        if accumulate > 1:
            return 2 * w.largest
        return self.kept(w, accumulate, checkpointing) + self.prefetch

    @property
    def keeps_gradients(self) -> bool:
        """True if each parameter's gradient stays until the backward pass is over."""
        return self.stage < 2

    def after_backward(
        self, w: Weights, ranks: int, accumulate: int, checkpointing: bool
    ) -> dict[str, float]:
        """Return the bytes while the last gradients are sent, when the activations are gone."""
        gradients = self.bytes * w.trained
        if self.stage == 0:
            return {"gradients": gradients, "all-reduce": self.bytes * min(w.trained, 5e8)}
        if self.stage == 1:
            shard = 0 if self.offload else gradients / ranks
            return {"gradients": gradients + shard, "buckets": self.bytes * self.buckets}
        if self.stage == 3:
            # The last bucket, its reduced shard, and the largest gradient.
            held = self.in_backward(w, ranks, accumulate, checkpointing)
            bucket = min(self.buckets, w.trained)
            held["gradients sent"] = self.bytes * (w.largest + bucket * (1 + 1 / ranks))
            return held
        return {}

    def in_step(self, w: Weights, ranks: int, temporaries: int) -> dict[str, float]:
        """Return the bytes while the optimizer steps; temporaries: a value of ADAM."""
        if self.offload:
            return {}
        if self.stage == 0:
            return {
                "gradients": FLOAT * w.trained,
                "optimizer's temporaries": temporaries * FLOAT * w.largest,
            }

        held: dict[str, float] = {}
        at_once = w.group / ranks
        if self.stage == 3:
            at_once = min(at_once, self.sub_group)
        else:
            held["gradients"] = self.bytes * w.trained / ranks
        held["fp32 gradients"] = FLOAT * at_once
        held["optimizer's temporaries"] = temporaries * FLOAT * at_once
        return held

    def sent(
        self, w: Weights, ranks: int, accumulate: int, checkpointing: bool
    ) -> dict[str, float]:
        """Return the bytes of weights and gradients that a rank sends in a step.

        The collectives send each byte once (rings).
        """
        once = (ranks - 1) / ranks * self.bytes
        if self.stage == 3:
            # GradCache adds a forward pass for each micro-batch.
            uses = 2 if accumulate == 1 else 3 * accumulate
            sharded = w.all - w.small
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
