"""Named tensors that are read or computed on demand."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor


class LazyTensors(Mapping[str, Tensor]):
    """Named tensors that are read or computed on demand.

    meta: {name: tensor on the meta device}, their shapes and types at no cost. unused_entries:
    other entries of their file that hold tensors.
    """

    def __init__(
        self,
        meta: dict[str, Tensor],
        get: Callable[[str], Tensor],
        unused_entries: Iterable[str] = (),
    ):
        self.meta = meta
        self._read = get
        self.unused_entries = tuple(unused_entries)

    @classmethod
    def from_dict(
        cls, tensors: Mapping[str, Tensor], unused_entries: Iterable[str] = ()
    ) -> "LazyTensors":
        """Wrap tensors that are in memory, or memory-mapped."""
        meta = {name: tensor.to("meta") for name, tensor in tensors.items()}
        return cls(meta, tensors.__getitem__, unused_entries)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.meta:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.meta)

    def __len__(self) -> int:
        return len(self.meta)

    def __contains__(self, name: object) -> bool:
        return name in self.meta

    def rename(self, names: Mapping[str, str]) -> "LazyTensors":
        """Return some of the tensors under new names; names: {new name: name here}."""
        meta = {new: self.meta[old] for new, old in names.items()}
        return LazyTensors(meta, lambda new: self[names[new]], self.unused_entries)


def and_more(names: Sequence[str]) -> str:
    """Return " (and N more)" for all names but the first."""
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def check_shapes(tensors: LazyTensors, wanted: Mapping[str, torch.Size], whose: str) -> None:
    """Raise ValueError naming the first tensor that is missing, left over, or of another shape than
    in `wanted`.
    """
    if missing := [name for name in wanted if name not in tensors]:
        raise ValueError(f"{whose}: {missing[0]} is missing{and_more(missing)}")
    if extra := [name for name in tensors if name not in wanted]:
        raise ValueError(f"{whose}: no place for {extra[0]}{and_more(extra)}")
    for name, shape in wanted.items():
        meta = tensors.meta[name]
        if not meta.is_floating_point():
            raise ValueError(
                f"{whose}: {name} is {meta.dtype}; weights are floats: give them as they were"
                " before quantizing"
            )
        if meta.shape != shape:
            raise ValueError(
                f"{whose}: {name} is {tuple(meta.shape)}; its architecture makes it {tuple(shape)}"
            )
