"""Memory and communication of DeepSpeed's ZeRO stages 0 to 3, by formula (DeepSpeed 0.19.8).

    zero = ZeroMemory.from_json(json.loads(text))
    zero.persistent_bytes(counts, ranks)                          {purpose: bytes} on one rank
    zero.step_bytes(counts, ranks, ADAM_TEMPORARIES["gpu"])       {purpose: bytes} on one rank

Purposes are weights, fp32 weights, moments, gradients and buffers. The formulas follow the source
code of DeepSpeed, and run/bench_plan.py compares them with measurements. They differ from the ZeRO
paper in three ways:

- ZeRO-1 keeps all gradients until the end of the backward pass.
- The temporaries of the optimizer are as large as the tensors that it updates at once.
- ZeRO-3 keeps weights gathered according to stage3_max_reuse_distance. stage3_max_live_parameters
  only limits prefetching.

All memory is in bytes, all counts are numbers of parameters.
"""

from dataclasses import dataclass

import torch

from glimpse.model import ema
from glimpse.run.lib.config import RunConfig
from glimpse.run.train import optim

FP32_BYTES = 4
# fp32 temporaries of torch's AdamW, in sizes of the tensors that it updates at once: one tensor
# after another on a CPU, foreach on a GPU.
ADAM_TEMPORARIES = {"cpu": 2, "gpu": 1}


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters of a method."""

    trained: int
    frozen: int
    ema: int  # frozen parameters of an EMA teacher
    unsharded: int  # trained parameters below ZeRO-3's persistence threshold
    largest: int  # the largest trained parameter
    largest_group: int  # the largest parameter group of the optimizer

    @property
    def total(self) -> int:
        return self.trained + self.frozen

    @classmethod
    def from_method(
        cls, method: torch.nn.Module, cfg: RunConfig, threshold: int
    ) -> "ParameterCounts":
        """Count the parameters of a method.

        threshold: trained parameters with fewer elements count as unsharded.
        """
        trained = [p.numel() for p in method.parameters() if p.requires_grad]
        frozen = [p.numel() for p in method.parameters() if not p.requires_grad]
        groups = optim.parameter_groups(method, cfg.optim)
        group_sizes = [sum(p.numel() for p in group["params"]) for group in groups]
        ema_sizes = [
            teacher.numel() for teacher, _ in ema.pair_parameters(method.ema_pairs()).values()
        ]
        unsharded = [size for size in trained if size < threshold]
        return cls(
            trained=sum(trained),
            frozen=sum(frozen),
            ema=sum(ema_sizes),
            unsharded=sum(unsharded),
            largest=max(trained),
            largest_group=max(group_sizes),
        )


@dataclass(frozen=True)
class ZeroMemory:
    """Predict memory and communication from a DeepSpeed JSON.

    The fields are the settings that matter for memory, with DeepSpeed's defaults.
    """

    stage: int
    bf16: bool
    bucket_elements: int  # gradients that are reduced together, over all bucket buffers
    persistence_threshold: int
    max_reuse_distance: int
    prefetch_bucket_size: int
    sub_group_size: int
    offload_optimizer: bool  # fp32 weights, moments and gradients are in host memory
    offload_parameters: bool

    @classmethod
    def from_json(cls, tree: dict) -> "ZeroMemory":
        """Read the settings from a DeepSpeed JSON, as run/train/engine.py loads it."""
        zero = tree.get("zero_optimization", {})
        stage = zero.get("stage", 0)
        bucket_elements = 0
        if zero.get("contiguous_gradients", True):
            bucket_elements = int(zero.get("reduce_bucket_size", 5e8))
        # overlap_comm fills one bucket while the other is reduced.
        if stage in (1, 2) and zero.get("overlap_comm"):
            bucket_elements *= 2
        return cls(
            stage=stage,
            bf16=bool(tree.get("bf16", {}).get("enabled")),
            bucket_elements=bucket_elements,
            persistence_threshold=int(zero.get("stage3_param_persistence_threshold", 1e5)),
            max_reuse_distance=int(zero.get("stage3_max_reuse_distance", 1e9)),
            prefetch_bucket_size=int(zero.get("stage3_prefetch_bucket_size", 5e7)),
            sub_group_size=int(zero.get("sub_group_size", 1e9)),
            offload_optimizer=zero.get("offload_optimizer", {}).get("device", "none") != "none",
            offload_parameters=zero.get("offload_param", {}).get("device", "none") != "none",
        )

    @property
    def element_bytes(self) -> int:
        """Bytes of one element of a weight or gradient in computation and communication."""
        return 2 if self.bf16 else FP32_BYTES

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.bf16 else torch.float32

    def persistent_bytes(self, counts: ParameterCounts, ranks: int) -> dict[str, float]:
        """Return {purpose: bytes} that stay allocated between steps."""
        weight_share = 1 / ranks if self.stage == 3 else 1
        # This rank's shard of the optimizer states.
        shard = 0 if self.offload_optimizer else counts.trained / ranks
        weights = 0 if self.offload_parameters else self.element_bytes * counts.total * weight_share
        memory = {"weights": weights}
        if self.stage == 0:
            memory["moments"] = 2 * FP32_BYTES * counts.trained
        else:
            memory["fp32 weights"] = FP32_BYTES * shard
            memory["moments"] = 2 * FP32_BYTES * shard
        if counts.ema:
            # With bf16 the EMA teacher has an fp32 copy next to its bf16 weights.
            memory["fp32 EMA"] = FP32_BYTES * counts.ema * weight_share if self.bf16 else 0
        if self.stage == 3:
            memory["gradients"] = self.element_bytes * shard
            memory["buckets"] = self.element_bytes * self.bucket_elements
            # On one rank a shard is the full weight, and gathering copies nothing.
            memory["small weights"] = 0 if ranks == 1 else self.element_bytes * counts.unsharded
        return memory

    def parameters_kept_gathered(
        self, counts: ParameterCounts, accumulate: int, checkpointing: bool
    ) -> float:
        """Return the number of sharded parameters that ZeRO-3 keeps gathered between two uses.

        ZeRO-3 keeps a weight if its next use is nearer than stage3_max_reuse_distance. The distance
        is counted in parameters, from the forward pass through the layers above and back to the
        weight's backward pass; with recomputation the layers above count once more.
        With micro-batches, DeepSpeed never completes its record of the order of modules, so that it
        keeps and prefetches nothing.
        """
        if accumulate > 1:
            return 0.0
        passes = 3 if checkpointing else 2
        return min(counts.total - counts.unsharded, self.max_reuse_distance / passes)

    def backward_bytes(
        self, counts: ParameterCounts, ranks: int, accumulate: int, checkpointing: bool
    ) -> dict[str, float]:
        """Return {purpose: bytes} during the backward pass.

        Activations and the gradient that is being computed are not included.
        """
        if self.stage == 0:
            return {}
        if self.stage == 3:
            gathered: float = 0
            if ranks > 1:
                limit = self.parameters_gathered(counts, accumulate, checkpointing)
                gathered = min(counts.total - counts.unsharded, limit)
            # A full bucket is copied before it is sent. Without checkpointing, the activations that
            # have been freed by then make room for the copy.
            sent = min(self.bucket_elements, counts.trained) if checkpointing else 0
            return {
                "gathered weights": self.element_bytes * gathered,
                "gradients sent": self.element_bytes * sent,
            }

        memory: dict[str, float] = {}
        if self.stage == 2:
            shard = 0 if self.offload_optimizer else self.element_bytes * counts.trained / ranks
            memory["gradients"] = shard
        memory["buckets"] = self.element_bytes * self.bucket_elements
        return memory

    def parameters_gathered(
        self, counts: ParameterCounts, accumulate: int, checkpointing: bool
    ) -> float:
        """Return an upper limit of the sharded parameters that ZeRO-3 holds gathered at once."""
        if accumulate > 1:
            return 2 * counts.largest
        kept_parameters = self.parameters_kept_gathered(counts, accumulate, checkpointing)
        return kept_parameters + self.prefetch_bucket_size

    @property
    def keeps_gradients(self) -> bool:
        """True if every parameter keeps its gradient until the end of the backward pass."""
        return self.stage < 2

    def reduction_bytes(
        self, counts: ParameterCounts, ranks: int, accumulate: int, checkpointing: bool
    ) -> dict[str, float]:
        """Return {purpose: bytes} while the last gradients are reduced, after the backward pass."""
        gradients = self.element_bytes * counts.trained
        if self.stage == 0:
            all_reduce = self.element_bytes * min(counts.trained, 5e8)
            return {"gradients": gradients, "all-reduce": all_reduce}
        if self.stage == 1:
            shard = 0 if self.offload_optimizer else gradients / ranks
            return {
                "gradients": gradients + shard,
                "buckets": self.element_bytes * self.bucket_elements,
            }
        if self.stage == 3:
            # The last bucket, its reduced shard, and the largest gradient.
            memory = self.backward_bytes(counts, ranks, accumulate, checkpointing)
            bucket = min(self.bucket_elements, counts.trained)
            sent = counts.largest + bucket * (1 + 1 / ranks)
            memory["gradients sent"] = self.element_bytes * sent
            return memory
        return {}

    def step_bytes(self, counts: ParameterCounts, ranks: int, temporaries: int) -> dict[str, float]:
        """Return {purpose: bytes} during the optimizer step.

        temporaries: a value of ADAM_TEMPORARIES.
        """
        if self.offload_optimizer:
            return {}
        if self.stage == 0:
            return {
                "gradients": FP32_BYTES * counts.trained,
                "optimizer's temporaries": temporaries * FP32_BYTES * counts.largest,
            }

        memory: dict[str, float] = {}
        updated_at_once = counts.largest_group / ranks
        if self.stage == 3:
            updated_at_once = min(updated_at_once, self.sub_group_size)
        else:
            memory["gradients"] = self.element_bytes * counts.trained / ranks
        memory["fp32 gradients"] = FP32_BYTES * updated_at_once
        memory["optimizer's temporaries"] = temporaries * FP32_BYTES * updated_at_once
        return memory

    def sent_bytes(
        self, counts: ParameterCounts, ranks: int, accumulate: int, checkpointing: bool
    ) -> dict[str, float]:
        """Return {collective: bytes} of weights and gradients that a rank sends in one step.

        Collectives are counted as rings: a gather or scatter sends (ranks - 1) / ranks of a tensor,
        an all-reduce twice that.
        """
        ring = (ranks - 1) / ranks * self.element_bytes
        if self.stage == 3:
            # A weight is used in the forward and in the backward pass. GradCache adds a forward
            # pass for each micro-batch.
            uses = 2 if accumulate == 1 else 3 * accumulate
            sharded = counts.total - counts.unsharded
            kept_parameters = self.parameters_kept_gathered(counts, accumulate, checkpointing)
            gathered_again = (uses - 1) * (sharded - kept_parameters)
            return {
                "gather weights": ring * (sharded + gathered_again + counts.unsharded),
                "scatter gradients": ring * counts.trained * accumulate,
            }
        if self.stage == 0:
            return {"all-reduce gradients": 2 * ring * counts.trained}
        reductions = accumulate if self.stage == 2 else 1
        return {
            "all-reduce gradients": 2 * ring * counts.trained * reductions,
            "gather weights": ring * counts.trained,
        }
