"""What is compared: the adapter path, merges onto either base in each format, and both bases alone.

Each is named tensors, and perhaps an adapter on top, made into a model when its turn comes. It does not know how a
merge is computed: whoever does gives the tensors.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from adapters.merge.formats import BESIDE, FORMATS, can_hold
from adapters.merge.models import compute_type, dense_model, tensors_of, written_model
from adapters.merge.report import BASES, Part, name_of
from adapters.merge.unmerged import with_adapter


class Weights(Protocol):
    """Every tensor of the model, in the same order whatever is asked for, one at a time, in fp32."""

    path: Path
    """Directory of the base, for its configuration and tokenizer."""
    bases: tuple[str, ...]
    """Of BASES, those that are there: a base that is published in NF4 has no original."""
    linear: frozenset[str]
    """Names of the weights that NF4 packs."""
    count: int
    """How many tensors there are."""
    config_changes: Mapping[str, Any]
    """What must be different in config.json for them."""

    def base(self, which: str) -> Iterator[tuple[str, Tensor]]: ...

    def merged(self, which: str) -> Iterator[tuple[str, Tensor]]: ...


@dataclass(frozen=True)
class Variant:
    part: Part
    base: str
    stored: str

    @property
    def name(self) -> str:
        return name_of(self.part, self.base, self.stored)

    @property
    def computed(self) -> str:
        return str(compute_type(self.stored)).removeprefix("torch.")

    def load(self, weights: Weights, adapter: Path) -> Any:
        given = weights.merged(self.base) if self.part == "merged" else weights.base(self.base)
        model = self._made_of(given, weights)
        return with_adapter(model, adapter, weights.path) if self.part == "adapter" else model

    def load_written(self, directory: Path, dtype: str, weights: Weights) -> Any:
        """From the files of a merge themselves, of this type: as they lie, or as they become in the format wanted."""
        if dtype == self.stored:
            return written_model(directory, compute_type(self.stored))
        return self._made_of(tensors_of(directory), weights)

    def _made_of(self, tensors: Iterator[tuple[str, Tensor]], weights: Weights) -> Any:
        rounded = _rounded(tensors, self.stored, weights.linear)
        return dense_model(weights.path, rounded, compute_type(self.stored), weights.config_changes)


def variants(trained_on: str, bases: Collection[str], onto: str, stored: str) -> list[Variant]:
    """First the reference; then it in bf16, which shows what is rounding alone; the wanted merge is among the rest.
    The base in 16 bits comes before the one in NF4: what NF4 costs it is measured against it."""
    there = [base for base in BASES if base in bases]
    found = [
        Variant("adapter", trained_on, "float32"),
        Variant("adapter", trained_on, "bfloat16"),
        Variant("merged", onto, "float32"),
        Variant("merged", onto, stored),
        *(Variant("merged", base, "bfloat16") for base in there),
        *(Variant("merged", base, "nf4") for base in there),
        *(Variant("base", base, "bfloat16") for base in reversed(there)),
    ]
    return list(dict.fromkeys(found))


def _rounded(
    tensors: Iterator[tuple[str, Tensor]], stored: str, linear: Collection[str]
) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors:
        fits = can_hold(stored, tensor, linear=name in linear)
        rounded = FORMATS[stored if fits else BESIDE[stored]]
        yield name, rounded(tensor) if tensor.is_floating_point() else tensor
