"""Named tensors that are read or made only when they are asked for."""

from collections.abc import Callable, Iterable, Iterator, Mapping

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
