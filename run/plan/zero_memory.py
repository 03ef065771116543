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

FP32_BYTES = 4  # bytes of fp32
# fp32 temporaries of torch's AdamW, in sizes of the tensors that it steps at once: one tensor after
# another, or foreach.
ADAM_TEMPORARIES = {"cpu": 2, "gpu": 1}


@dataclass(frozen=True)
class ParameterCounts:
    """Counts of a method's parameters."""

    trained: int
    frozen: int
    ema: int  # frozen parameters that follow the student
    unsharded: int  # trained parameters that ZeRO-3 does not shard in use
    largest: int  # the largest trained parameter
    largest_group: int  # the largest group of the optimizer

    @property
    def total(self) -> int:
        return self.trained + self.frozen

    @classmethod
    def from_method(
        cls, method: torch.nn.Module, cfg: RunConfig, threshold: int
    ) -> "ParameterCounts":
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
            ema=sum(averages),
            unsharded=sum(small),
            largest=max(trained),
            largest_group=max(group_sizes),
        )


@dataclass(frozen=True)
class ZeroMemory:
    """The settings of a DeepSpeed JSON that determine memory, with DeepSpeed's defaults."""

    stage: int
    bf16: bool
    bucket_elements: int  # elements of gradients that are sent together, all buffers
    persistence_threshold: int
    max_reuse_distance: int
    prefetch_bucket_size: int
    sub_group_size: int
    offload_optimizer: bool  # fp32 copies, moments and gradients in the host's memory
    offload_parameters: bool

    @classmethod
    def from_json(cls, tree: dict) -> "ZeroMemory":
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
            bucket_elements=buckets,
            persistence_threshold=int(zero.get("stage3_param_persistence_threshold", 1e5)),
            max_reuse_distance=int(zero.get("stage3_max_reuse_distance", 1e9)),
            prefetch_bucket_size=int(zero.get("stage3_prefetch_bucket_size", 5e7)),
            sub_group_size=int(zero.get("sub_group_size", 1e9)),
            offload_optimizer=zero.get("offload_optimizer", {}).get("device", "none") != "none",
            offload_parameters=zero.get("offload_param", {}).get("device", "none") != "none",
        )

    @property
    def element_bytes(self) -> int:
        """The size of a weight or gradient in computation and communication."""
        return 2 if self.bf16 else FP32_BYTES

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.bf16 else torch.float32

    def persistent_bytes(self, w: ParameterCounts, ranks: int) -> dict[str, float]:
        """Return the bytes that stay from step to step."""
        share = 1 / ranks if self.stage == 3 else 1
        shard = 0 if self.offload_optimizer else w.trained / ranks  # of the optimizer's states
        held = {"weights": 0 if self.offload_parameters else self.element_bytes * w.total * share}
        if self.stage == 0:
            held["moments"] = 2 * FP32_BYTES * w.trained
        else:
            held["fp32 weights"] = FP32_BYTES * shard
            held["moments"] = 2 * FP32_BYTES * shard
        if w.ema:
            # With bf16, an fp32 copy beside the teacher's weights.
            held["average"] = FP32_BYTES * w.ema * share if self.bf16 else 0
        if self.stage == 3:
            held["gradients"] = self.element_bytes * shard
            held["buckets"] = self.element_bytes * self.bucket_elements
            # A single rank has full shards, and gathering them copies nothing.
            held["small weights"] = 0 if ranks == 1 else self.element_bytes * w.unsharded
        return held

    def parameters_kept_gathered(
        self, w: ParameterCounts, accumulate: int, checkpointing: bool
    ) -> float:
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
        return min(w.total - w.unsharded, self.max_reuse_distance / passes)

    def backward_bytes(
        self, w: ParameterCounts, ranks: int, accumulate: int, checkpointing: bool
    ) -> dict[str, float]:
        """Return the bytes beside the activations and the gradient that is being computed."""
        if self.stage == 0:
            return {}
        if self.stage == 3:
            gathered: float = 0
            if ranks > 1:
                ahead = self.parameters_gathered(w, accumulate, checkpointing)
                gathered = min(w.total - w.unsharded, ahead)
            # A full bucket is copied to be sent. Without checkpointing, activations have been freed
            # by then and make room for it.
            sent = min(self.bucket_elements, w.trained) if checkpointing else 0
            return {
                "gathered weights": self.element_bytes * gathered,
                "gradients sent": self.element_bytes * sent,
            }

        held: dict[str, float] = {}
        if self.stage == 2:
            held["gradients"] = (
                0 if self.offload_optimizer else self.element_bytes * w.trained / ranks
            )
        held["buckets"] = self.element_bytes * self.bucket_elements
        return held

    def parameters_gathered(
        self, w: ParameterCounts, accumulate: int, checkpointing: bool
    ) -> float:
        """Return the number of weights that ZeRO-3 holds gathered, if there are that many."""
        if accumulate > 1:
            return 2 * w.largest
        return (
            self.parameters_kept_gathered(w, accumulate, checkpointing) + self.prefetch_bucket_size
        )

    @property
    def keeps_gradients(self) -> bool:
        """True if each parameter's gradient stays until the backward pass is over."""
        return self.stage < 2

    def reduction_bytes(
        self, w: ParameterCounts, ranks: int, accumulate: int, checkpointing: bool
    ) -> dict[str, float]:
        """Return the bytes while the last gradients are sent, when the activations are gone."""
        gradients = self.element_bytes * w.trained
        if self.stage == 0:
            return {"gradients": gradients, "all-reduce": self.element_bytes * min(w.trained, 5e8)}
        if self.stage == 1:
            shard = 0 if self.offload_optimizer else gradients / ranks
            return {
                "gradients": gradients + shard,
                "buckets": self.element_bytes * self.bucket_elements,
            }
        if self.stage == 3:
            # The last bucket, its reduced shard, and the largest gradient.
            held = self.backward_bytes(w, ranks, accumulate, checkpointing)
            bucket = min(self.bucket_elements, w.trained)
            held["gradients sent"] = self.element_bytes * (w.largest + bucket * (1 + 1 / ranks))
            return held
        return {}

    def step_bytes(self, w: ParameterCounts, ranks: int, temporaries: int) -> dict[str, float]:
        """Return the bytes while the optimizer steps; temporaries: a value of ADAM."""
        if self.offload_optimizer:
            return {}
        if self.stage == 0:
            return {
                "gradients": FP32_BYTES * w.trained,
                "optimizer's temporaries": temporaries * FP32_BYTES * w.largest,
            }

        held: dict[str, float] = {}
        at_once = w.largest_group / ranks
        if self.stage == 3:
            at_once = min(at_once, self.sub_group_size)
        else:
            held["gradients"] = self.element_bytes * w.trained / ranks
        held["fp32 gradients"] = FP32_BYTES * at_once
        held["optimizer's temporaries"] = temporaries * FP32_BYTES * at_once
        return held

    def sent_bytes(
        self, w: ParameterCounts, ranks: int, accumulate: int, checkpointing: bool
    ) -> dict[str, float]:
        """Return the bytes of weights and gradients that a rank sends in a step.

        The collectives send each byte once (rings).
        """
        once = (ranks - 1) / ranks * self.element_bytes
        if self.stage == 3:
            # GradCache adds a forward pass for each micro-batch.
            uses = 2 if accumulate == 1 else 3 * accumulate
            sharded = w.total - w.unsharded
            again = (uses - 1) * (
                sharded - self.parameters_kept_gathered(w, accumulate, checkpointing)
            )
            return {
                "gather weights": once * (sharded + again + w.unsharded),
                "scatter gradients": once * w.trained * accumulate,
            }
        if self.stage == 0:
            return {"all-reduce gradients": 2 * once * w.trained}
        times = accumulate if self.stage == 2 else 1
        return {
            "all-reduce gradients": 2 * once * w.trained * times,
            "gather weights": once * w.trained,
        }
