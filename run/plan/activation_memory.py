"""Measure the memory of a forward and backward pass, by running the method on fake tensors.

    trace = traced(cfg, vocab, tokens, micro, torch.bfloat16, keep=False)
        nothing of the size of a weight is ever allocated
    trace.forward, trace.saved, trace.backward

Storages are counted while they live, as an allocator without waste would hold them. Weights and
temporaries inside a kernel are not counted. The loss is left out: its memory grows with ranks and
batch (model/losses.py, run/plan/zero_memory.py).
Letters: B samples of a micro-batch.
"""

import weakref
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from glimpse.model.methods import build_method
from glimpse.run.lib.config import RunConfig
from glimpse.run.plan import synthetic_batch


class LiveMemory(TorchDispatchMode):
    """Count the bytes of live storages that operations allocated: `now`, and their `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.current = 0
        self.peak = 0
        self.sizes: dict[int, int] = {}

    def ignore(self, *tensors: torch.Tensor) -> None:
        """Leave out storages that existed before."""
        for tensor in tensors:
            self.sizes[tensor.untyped_storage()._cdata] = 0

    def add_storage(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.current += storage.nbytes()
            self.peak = max(self.peak, self.current)
            weakref.finalize(storage, self.remove_storage, key)

    def remove_storage(self, key: int) -> None:
        self.current -= self.sizes.pop(key)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_iter(out):
            if isinstance(leaf, torch.Tensor) and leaf.device.type != "meta":
                self.add_storage(leaf)
        return out


@dataclass(frozen=True)
class ActivationTrace:
    """Bytes on one rank of the batch and of everything computed from it."""

    forward: int  # peak in the forward pass
    saved: int  # after the forward pass
    backward: int  # peak from then on
    features: int  # the inputs of the loss, a part of `saved`


def trace_activations(
    cfg: RunConfig,
    vocab: int,
    tokens: float,
    micro_batch_size: int,
    dtype: torch.dtype,
    keep_gradients: bool,
) -> ActivationTrace:
    """Trace a micro-batch of `micro` samples.

    keep: gradients stay until the end of the backward pass, as before ZeRO-2, and count.
    """
    with FakeTensorMode():
        method = build_with_dtype(cfg, vocab, dtype)
        if not keep_gradients:
            for parameter in method.parameters():
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(free_gradient)

        with LiveMemory() as alive:
            # 1. Forward. The temporaries that drew the batch are not part of its peak.
            alive.ignore(*method.parameters(), *method.buffers())
            part = synthetic_batch.random_micro_batch(cfg, tokens, micro_batch_size)
            alive.peak = alive.current
            features = method(part)
            forward = alive.peak
            saved = alive.current

            # 2. Backward, from features that the loss would give a gradient.
            alive.peak = alive.current
            trained = [feature for feature in features.values() if feature.requires_grad]
            torch.autograd.backward(trained, [torch.ones_like(feature) for feature in trained])
            feature_bytes = sum(feature.nbytes for feature in features.values())
            return ActivationTrace(forward, saved, alive.peak, feature_bytes)


def build_with_dtype(cfg: RunConfig, vocab: int, dtype: torch.dtype) -> torch.nn.Module:
    """Build the method with weights of a type, on the current device or under the current mode."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return build_method(cfg, vocab)
    finally:
        torch.set_default_dtype(before)


def free_gradient(parameter: torch.nn.Parameter) -> None:
    parameter.grad = None
