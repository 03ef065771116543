"""One table for both ways: which of our tensors correspond to which of a foreign format's, and how
each is computed from the other.

    Rule(("text.norm.weight",), ("ln_final.weight",))
    Rule(("patch.weight",), ("conv1.weight",), out=as_kernel, back=as_matrix)

A format is a function that returns such rules for an architecture; `exported` and `imported` apply
them lazily, so that a conversion never holds more than the tensors of one rule, before and after.
Both refuse a tensor that no rule uses, and a rule whose tensor is missing: every tensor is used
exactly once.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from glimpse.model.lazy_tensors import LazyTensors, and_more


def same(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tensors


@dataclass(frozen=True)
class Rule:
    """Some of our tensors, and the foreign ones that are computed from them alone.

    out: ours -> theirs; back: theirs -> ours, both with torch operations that run on meta tensors
    too. Each takes its tensors as arguments and returns one tensor, or a tuple of them. They are
    inverse, bit for bit, unless `folded`: then `out` loses information (a bias added to positions),
    and the writer of a file keeps our tensors beside it.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    out: Callable = same
    back: Callable = same
    folded: bool = False


def exported(rules: Iterable[Rule], ours: LazyTensors) -> LazyTensors:
    """Return our tensors as the foreign ones."""
    return applied([(rule.ours, rule.theirs, rule.out) for rule in rules], ours, "the model")


def imported(rules: Iterable[Rule], tensors: LazyTensors, whose: str) -> LazyTensors:
    """Return foreign tensors as ours; `whose` names the file or folder in errors."""
    return applied([(rule.theirs, rule.ours, rule.back) for rule in rules], tensors, whose)


def applied(
    steps: list[tuple[tuple[str, ...], tuple[str, ...], Callable]], source: LazyTensors, whose: str
) -> LazyTensors:
    """Return the outputs of all steps, computed when they are read.

    steps: (names in the source, names of the outputs, function).
    """
    # 1. Every tensor of the source is used exactly once.
    needed = [name for names, _, _ in steps for name in names]
    assert len(needed) == len(set(needed)), "a table uses a tensor twice"
    if missing := [name for name in needed if name not in source]:
        raise ValueError(
            f"{whose}: {missing[0]} is missing{and_more(missing)}; incomplete, or of another"
            " architecture than it says"
        )
    if extra := sorted(source.meta.keys() - set(needed)):
        raise ValueError(
            f"{whose}: nothing takes {extra[0]} {tuple(source.meta[extra[0]].shape)}"
            f"{and_more(extra)}; it holds more than this format, or another architecture"
        )

    # 2. Each step on meta tensors: the shapes and types of its outputs.
    meta, step_of = {}, {}
    for step in steps:
        inputs, outputs, function = step
        try:
            tensors = as_tuple(function(*(source.meta[name] for name in inputs)))
        except RuntimeError as error:  # of torch: shapes that do not go together
            shapes = ", ".join(f"{name} {tuple(source.meta[name].shape)}" for name in inputs)
            raise ValueError(
                f"{whose}: {shapes}: not the shape of this architecture"
                f" ({str(error).splitlines()[0]})"
            ) from None
        assert len(tensors) == len(outputs), f"{outputs}: the table makes {len(tensors)} tensors"
        for name, tensor in zip(outputs, tensors):
            assert name not in meta, f"a table makes {name} twice"
            meta[name], step_of[name] = tensor.to("meta"), step

    # 3. The values, on demand. `latest` holds the outputs of the last step that are not read yet,
    # because q, k and v are read one after another.
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


# Transforms of several formats, each with its inverse.  Letters: D width, P patch side, E
# embedding, H heads.


def as_kernel(weight: Tensor) -> Tensor:
    """Return a linear layer over patches (D, 3 P P) as the equal convolution (D, 3, P, P)."""
    side = round((weight.shape[1] // 3) ** 0.5)
    return weight.reshape(len(weight), 3, side, side)


def as_matrix(kernel: Tensor) -> Tensor:
    """Invert `as_kernel`."""
    return kernel.flatten(1)


def transposed(weight: Tensor) -> Tensor:
    """Return a linear layer's (out, in) as (in, out), and back."""
    return weight.t()


def thirds(qkv: Tensor) -> tuple[Tensor, ...]:
    """Return a fused (3 D, ...) as q, k and v."""
    return qkv.chunk(3)


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Invert `thirds`."""
    return torch.cat([q, k, v])


def scalar(scale: Tensor) -> Tensor:
    """Return our (1,) as a 0-dim tensor."""
    return scale.reshape(())


def one(scale: Tensor) -> Tensor:
    """Invert `scalar`."""
    return scale.reshape(1)
