"""Tables of rules that convert tensors between Glimpse and a foreign format, in both directions.

A rule lists some tensors of Glimpse, the foreign tensors that correspond to them, and the functions
that compute one from the other:

    Rule(("text.norm.weight",), ("ln_final.weight",))
    Rule(("patch.weight",), ("conv1.weight",), to_foreign=as_kernel, from_foreign=as_matrix)

A format provides a function that returns the rules for an architecture. `export_tensors` and
`import_tensors` apply them lazily: at most the inputs and outputs of one rule are in memory. Both
raise ValueError for a tensor that no rule uses and for a rule whose tensor is missing, so every
tensor is used exactly once.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from glimpse.model.lazy_tensors import LazyTensors, and_more


def identity(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors unchanged: they differ only in name."""
    return tensors


@dataclass(frozen=True)
class Rule:
    """Tensors of Glimpse, and the foreign tensors that are computed from only these.

    to_foreign, from_foreign: take the tensors as arguments and return one tensor or a tuple of
    tensors. Both run on meta tensors too. They are bit-for-bit inverses unless `is_lossy`: then
    `to_foreign` loses information (it adds a bias to positions), and the writer of a file stores
    the Glimpse tensors next to it.
    """

    glimpse_names: tuple[str, ...]
    foreign_names: tuple[str, ...]
    to_foreign: Callable = identity
    from_foreign: Callable = identity
    is_lossy: bool = False


def export_tensors(rules: Iterable[Rule], tensors: LazyTensors) -> LazyTensors:
    """Convert tensors of Glimpse to the foreign format."""
    steps = [(rule.glimpse_names, rule.foreign_names, rule.to_foreign) for rule in rules]
    return apply_rules(steps, tensors, "the model")


def import_tensors(rules: Iterable[Rule], tensors: LazyTensors, whose: str) -> LazyTensors:
    """Convert foreign tensors to tensors of Glimpse; `whose` is the file or folder for errors."""
    steps = [(rule.foreign_names, rule.glimpse_names, rule.from_foreign) for rule in rules]
    return apply_rules(steps, tensors, whose)


def apply_rules(
    steps: list[tuple[tuple[str, ...], tuple[str, ...], Callable]], source: LazyTensors, whose: str
) -> LazyTensors:
    """Return the outputs of all steps. Each is computed when it is read.

    steps: (names in the source, names of the outputs, function). ValueError if a tensor is missing,
    unused, or of the wrong shape.
    """
    # 1. Check that every tensor of the source is used exactly once.
    needed = [name for names, _, _ in steps for name in names]
    assert len(needed) == len(set(needed)), "two rules use the same tensor"
    if missing := [name for name in needed if name not in source]:
        raise ValueError(
            f"{whose}: {missing[0]} is missing{and_more(missing)}; the file is incomplete, or its"
            " config describes another architecture"
        )
    if extra := sorted(source.meta.keys() - set(needed)):
        raise ValueError(
            f"{whose}: unexpected tensor {extra[0]} {tuple(source.meta[extra[0]].shape)}"
            f"{and_more(extra)}; this architecture has no such tensor in this format"
        )

    # 2. Run each step on meta tensors to get the shapes and dtypes of its outputs.
    meta, step_of = {}, {}
    for step in steps:
        inputs, outputs, function = step
        try:
            tensors = as_tuple(function(*(source.meta[name] for name in inputs)))
        except RuntimeError as error:  # torch: the shapes do not match
            shapes = ", ".join(f"{name} {tuple(source.meta[name].shape)}" for name in inputs)
            raise ValueError(
                f"{whose}: {shapes}: wrong shape for this architecture"
                f" ({str(error).splitlines()[0]})"
            ) from None
        assert len(tensors) == len(outputs), f"{outputs}: the rule returns {len(tensors)} tensors"
        for name, tensor in zip(outputs, tensors):
            assert name not in meta, f"two rules produce {name}"
            meta[name], step_of[name] = tensor.to("meta"), step

    # 3. Compute values on demand. `latest` caches the unread outputs of the last step, because q, k
    # and v are read one after another.
    latest: dict[str, Tensor] = {}

    def get(name: str) -> Tensor:
        if name not in latest:
            inputs, outputs, function = step_of[name]
            latest.clear()
            latest.update(zip(outputs, as_tuple(function(*(source[n] for n in inputs)))))
        return latest.pop(name)

    return LazyTensors(meta, get)


def as_tuple(tensors: Tensor | Iterable[Tensor]) -> tuple[Tensor, ...]:
    return (tensors,) if isinstance(tensors, Tensor) else tuple(tensors)


# Transforms that several formats share, each with its inverse. D: width, P: patch size.


def as_kernel(weight: Tensor) -> Tensor:
    """Reshape the patch embedding from a linear layer (D, 3 P P) to a convolution (D, 3, P, P)."""
    side = round((weight.shape[1] // 3) ** 0.5)
    return weight.reshape(len(weight), 3, side, side)


def as_matrix(kernel: Tensor) -> Tensor:
    """Invert `as_kernel`."""
    return kernel.flatten(1)


def transpose(weight: Tensor) -> Tensor:
    """Transpose the weight of a linear layer: (out, in) to (in, out), and back."""
    return weight.t()


def split_qkv(qkv: Tensor) -> tuple[Tensor, ...]:
    """Split a fused qkv tensor (3 D, ...) into q, k and v, each (D, ...)."""
    return qkv.chunk(3)


def fuse_qkv(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Invert `thirds`."""
    return torch.cat([q, k, v])


def as_scalar(scale: Tensor) -> Tensor:
    """Reshape a scale (1,) to a 0-dim tensor."""
    return scale.reshape(())


def from_scalar(scale: Tensor) -> Tensor:
    """Invert `scalar`."""
    return scale.reshape(1)
