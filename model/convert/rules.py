"""One table for both ways: what of our tensors is what of a foreign format's, and how each is made
of the other, one at a time.

    Rule(("text.norm.weight",), ("ln_final.weight",))
    Rule(("patch.weight",), ("conv1.weight",), out=as_kernel, back=as_matrix)

A format is a function that yields such rules for an architecture; `exported` and `imported` apply
them lazily, so that a conversion
never holds more than the tensors of one rule, as they were and as they become. Both refuse a tensor
that no rule uses, and a rule whose tensor is missing: every tensor is used exactly once.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from glimpse.model.lazy_tensors import Tensors, more


def same(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tensors


@dataclass(frozen=True)
class Rule:
    """Some of our tensors, and the foreign ones that are made of them and of nothing else.

    out: ours -> theirs; back: theirs -> ours, both with torch operations that run on meta tensors
    too. Each takes its tensors one by one and returns one tensor or as many as it is for. They are
    inverse, bit for bit, unless `folded`: then `out` loses something (a bias added to positions),
    and who writes a file keeps ours beside it.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    out: Callable = same
    back: Callable = same
    folded: bool = False


def exported(rules: Iterable[Rule], ours: Tensors) -> Tensors:
    """Our tensors as the foreign ones."""
    return applied([(rule.ours, rule.theirs, rule.out) for rule in rules], ours, "the model")


def imported(rules: Iterable[Rule], theirs: Tensors, whose: str) -> Tensors:
    """Foreign tensors as ours; `whose` names the file or folder in errors."""
    return applied([(rule.theirs, rule.ours, rule.back) for rule in rules], theirs, whose)


def applied(steps: list[tuple], source: Tensors, whose: str) -> Tensors:
    needed = [name for names, _, _ in steps for name in names]
    assert len(needed) == len(set(needed)), "a table uses a tensor twice"
    if missing := [name for name in needed if name not in source]:
        raise ValueError(
            f"{whose}: {missing[0]} is missing{more(missing)}; incomplete, or of another"
            " architecture than it says"
        )
    if extra := sorted(source.meta.keys() - set(needed)):
        raise ValueError(
            f"{whose}: nothing takes {extra[0]} {tuple(source.meta[extra[0]].shape)}{more(extra)}; "
            "it holds more than this format, or another architecture"
        )
    meta, owner = {}, {}
    for step in steps:
        names, made, function = step
        try:
            tensors = as_tuple(function(*(source.meta[name] for name in names)))
        except RuntimeError as error:  # of torch: shapes that do not go together
            shapes = ", ".join(f"{name} {tuple(source.meta[name].shape)}" for name in names)
            raise ValueError(
                f"{whose}: {shapes}: not the shape of this architecture"
                f" ({str(error).splitlines()[0]})"
            ) from None
        assert len(tensors) == len(made), f"{made}: the table makes {len(tensors)} tensors"
        for name, tensor in zip(made, tensors):
            assert name not in meta, f"a table makes {name} twice"
            meta[name], owner[name] = tensor.to("meta"), step
    # of the step that was last applied, what nobody took yet: q, k and v are asked for one after
    # another
    latest: dict[str, Tensor] = {}

    def get(name: str) -> Tensor:
        if name not in latest:
            names, made, function = owner[name]
            latest.clear()
            latest.update(zip(made, as_tuple(function(*(source[n] for n in names)))))
        return latest.pop(name)

    return Tensors(meta, get)


def as_tuple(tensors) -> tuple[Tensor, ...]:
    return (tensors,) if isinstance(tensors, Tensor) else tuple(tensors)


# What several formats do to a tensor, each with its inverse.  Letters: D width, P patch side, E
# embedding, H heads.


def as_kernel(weight: Tensor) -> Tensor:
    """A linear layer over patches (D, 3 P P) as the convolution (D, 3, P, P) that it equals."""
    side = round((weight.shape[1] // 3) ** 0.5)
    return weight.reshape(len(weight), 3, side, side)


def as_matrix(kernel: Tensor) -> Tensor:
    """Its inverse."""
    return kernel.flatten(1)


def transposed(weight: Tensor) -> Tensor:
    """A linear layer's (out, in) as (in, out), and back."""
    return weight.t()


def thirds(qkv: Tensor) -> tuple[Tensor, ...]:
    """A fused (3 D, ...) as q, k and v."""
    return qkv.chunk(3)


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Its inverse."""
    return torch.cat([q, k, v])


def scalar(scale: Tensor) -> Tensor:
    """Our (1,) as a 0-dim tensor."""
    return scale.reshape(())


def one(scale: Tensor) -> Tensor:
    """Its inverse."""
    return scale.reshape(1)
