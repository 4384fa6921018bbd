"""Tensors by name, each read or computed when it is asked for, and again when it is asked for again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from adapters.base import shards_of
from adapters.merge.tensors import read_tensor
from adapters.safetensors_header import read_header

if TYPE_CHECKING:
    from torch import Tensor

NamedTensors = Mapping[str, "Tensor"]


class Computed(NamedTensors):
    """Nothing is kept of them."""

    def __init__(self, names: Iterable[str], compute: Callable[[str], Tensor]) -> None:
        self._names = dict.fromkeys(names)
        self._compute = compute

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._compute(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def in_files(directory: Path) -> NamedTensors:
    """As they lie in a model's directory."""
    spans = {name: (shard, span) for shard in shards_of(directory) for name, span in read_header(shard).items()}
    return Computed(spans, lambda name: read_tensor(*spans[name]))
