"""Measure the activation memory of a forward and backward pass on fake tensors.

    trace = trace_activations(cfg, vocab, tokens, 8, torch.bfloat16, keep_gradients=False)
    trace.forward, trace.saved, trace.backward    bytes on one rank

FakeTensorMode computes shapes and data types but allocates no storage, so even a large model is
traced in seconds on a CPU. The result is the number of live bytes, without the fragmentation of a
real allocator.

Not counted: parameters, temporaries inside a kernel, and the loss, whose memory grows with the
number of ranks and the batch (`contrastive_memory` in model/tiled_softmax.py).
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
    """Count the bytes of the live storages that operations under this mode have allocated.

    `current` is the number of bytes now, `peak` the maximum since it was last set.
    """

    def __init__(self) -> None:
        super().__init__()
        self.current = 0
        self.peak = 0
        self.sizes: dict[int, int] = {}  # {address of a storage: its bytes}

    def ignore(self, *tensors: torch.Tensor) -> None:
        """Exclude the storages of these tensors from the count."""
        for tensor in tensors:
            self.sizes[tensor.untyped_storage()._cdata] = 0

    def add_storage(self, tensor: torch.Tensor) -> None:
        """Count the tensor's storage, unless it is counted already."""
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
    """Bytes on one rank of a micro-batch and everything computed from it."""

    forward: int  # peak of the forward pass
    saved: int  # after the forward pass: what autograd keeps for the backward pass
    backward: int  # peak of the backward pass
    features: int  # the inputs of the loss, included in `saved`


def trace_activations(
    cfg: RunConfig,
    vocab: int,
    tokens: float,
    micro_batch_size: int,
    dtype: torch.dtype,
    keep_gradients: bool,
) -> ActivationTrace:
    """Trace the forward and backward pass of one micro-batch.

    vocab: rows of the token table.
    tokens: mean number of tokens of a caption.
    keep_gradients: count every gradient until the end of the backward pass, as ZeRO-0 and ZeRO-1
        keep it. If False, each gradient is freed as soon as it is computed.
    """
    with FakeTensorMode():
        method = build_with_dtype(cfg, vocab, dtype)
        if not keep_gradients:
            for parameter in method.parameters():
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(free_gradient)

        with LiveMemory() as memory:
            # 1. Forward pass. Resetting the peak excludes the temporaries of random_micro_batch.
            memory.ignore(*method.parameters(), *method.buffers())
            micro_batch = synthetic_batch.random_micro_batch(cfg, tokens, micro_batch_size)
            memory.peak = memory.current
            features = method(micro_batch)
            forward = memory.peak
            saved = memory.current

            # 2. Backward pass. Ones stand in for the gradient of the loss.
            memory.peak = memory.current
            trained = [feature for feature in features.values() if feature.requires_grad]
            torch.autograd.backward(trained, [torch.ones_like(feature) for feature in trained])
            feature_bytes = sum(feature.nbytes for feature in features.values())
            return ActivationTrace(forward, saved, memory.peak, feature_bytes)


def build_with_dtype(cfg: RunConfig, vocab: int, dtype: torch.dtype) -> torch.nn.Module:
    """Build the method with parameters of `dtype`, under the active device or tensor mode."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return build_method(cfg, vocab)
    finally:
        torch.set_default_dtype(previous)


def free_gradient(parameter: torch.nn.Parameter) -> None:
    parameter.grad = None
