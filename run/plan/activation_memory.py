"""What a forward and backward pass keeps in memory and computes, found by running the method itself
on tensors without contents.

    trace = traced(cfg, vocab, tokens, micro, torch.bfloat16)
        nothing of the size of a weight is ever allocated
    trace.forward, trace.saved, trace.backward

Storages are counted while they live, as an allocator that wastes nothing would hold them: weights
are not counted, temporaries inside a kernel are not seen. The loss is left out: what it needs grows
with ranks and batch (model/losses.py, run/plan/zero_memory.py).
Letters: B samples of a part.
"""

import weakref
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from glimpse.model.methods import build_method
from glimpse.run.lib.config import Run
from glimpse.run.plan import synthetic_batch


class Alive(TorchDispatchMode):
    """Bytes of the storages that operations made and something still holds: `now`, and `peak`,
    their most so far.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known: dict[int, int] = {}

    def ignore(self, *tensors: torch.Tensor) -> None:
        """Leave out storages that were there before."""
        for tensor in tensors:
            self.known[tensor.untyped_storage()._cdata] = 0

    def take(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.known:
            self.known[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.drop, key)

    def drop(self, key: int) -> None:
        self.now -= self.known.pop(key)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_iter(out):
            if isinstance(leaf, torch.Tensor) and leaf.device.type != "meta":
                self.take(leaf)
        return out


@dataclass(frozen=True)
class Trace:
    """Bytes on one rank, of the batch and what follows from it: their most in the forward pass,
    after it, their most from then on.
    """

    forward: int
    saved: int
    backward: int
    features: int  # of these, what goes into the loss


def traced(
    cfg: Run, vocab: int, tokens: float, micro: int, dtype: torch.dtype, keep: bool
) -> Trace:
    """A part of `micro` samples; keep: gradients stay until the end, as before ZeRO-2, and
    count.
    """
    with FakeTensorMode():
        method = built(cfg, vocab, dtype)
        if not keep:
            for parameter in filter(lambda p: p.requires_grad, method.parameters()):
                parameter.register_post_accumulate_grad_hook(dropped)
        with Alive() as alive:
            alive.ignore(*method.parameters(), *method.buffers())
            part = synthetic_batch.part(cfg, tokens, micro)
            alive.peak = alive.now
            features = method(part)
            forward, saved, alive.peak = alive.peak, alive.now, alive.now
            trained = [feature for feature in features.values() if feature.requires_grad]
            torch.autograd.backward(trained, [torch.ones_like(feature) for feature in trained])
            return Trace(
                forward, saved, alive.peak, sum(feature.nbytes for feature in features.values())
            )


def built(cfg: Run, vocab: int, dtype: torch.dtype) -> torch.nn.Module:
    """The method, its weights of that type, as the current mode or device makes them."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return build_method(cfg, vocab)
    finally:
        torch.set_default_dtype(before)


def dropped(parameter: torch.nn.Parameter) -> None:
    parameter.grad = None
