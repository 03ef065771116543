"""One table for both ways: what of our tensors is what of a foreign format's, and how each is made
of the other, one at a time.

    Rule(("text.norm.weight",), ("ln_final.weight",))
    Rule(("patch.weight",), ("conv1.weight",), out=as_kernel, back=as_matrix)

A format is a function that yields such rules for an architecture; `exported` and `imported` apply
them lazily, so that a conversion
never holds more than the tensors of one rule, as they were and as they become. Both refuse a tensor
that no rule uses, and a rule whose tensor is missing: every tensor is used exactly once.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


class Tensors(Mapping[str, Tensor]):
    """Named tensors that are read or made when they are asked for. `meta[name]`: their shape and
    type, on the meta device, at no cost.

    left_out: what else their file holds tensors under.
    """

    def __init__(
        self, meta: dict[str, Tensor], get: Callable[[str], Tensor], left_out: Iterable[str] = ()
    ):
        self.meta, self.get, self.left_out = meta, get, tuple(left_out)

    @classmethod
    def held(cls, tensors: Mapping[str, Tensor], left_out: Iterable[str] = ()) -> "Tensors":
        """Of tensors that are in memory, or memory-mapped."""
        return cls(
            {name: tensor.to("meta") for name, tensor in tensors.items()},
            tensors.__getitem__,
            left_out,
        )

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.meta:
            raise KeyError(name)
        return self.get(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.meta)

    def __len__(self) -> int:
        return len(self.meta)

    def __contains__(self, name: object) -> bool:
        return name in self.meta

    def renamed(self, names: Mapping[str, str]) -> "Tensors":
        """{new name: name here}: those tensors alone, under new names."""
        return Tensors(
            {new: self.meta[old] for new, old in names.items()},
            lambda new: self[names[new]],
            self.left_out,
        )


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


def more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def check_shapes(tensors: Tensors, wanted: Mapping[str, torch.Size], whose: str) -> None:
    """ValueError naming the first tensor that is missing, left over, or of another shape than
    `wanted`.
    """
    if missing := [name for name in wanted if name not in tensors]:
        raise ValueError(f"{whose}: {missing[0]} is missing{more(missing)}")
    if extra := [name for name in tensors if name not in wanted]:
        raise ValueError(f"{whose}: no place for {extra[0]}{more(extra)}")
    for name, shape in wanted.items():
        if not tensors.meta[name].is_floating_point():
            raise ValueError(
                f"{whose}: {name} is {tensors.meta[name].dtype}; weights are floats: give them as"
                " they were before quantizing"
            )
        if tensors.meta[name].shape != shape:
            raise ValueError(
                f"{whose}: {name} is {tuple(tensors.meta[name].shape)}; its architecture makes it"
                f" {tuple(shape)}"
            )


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
