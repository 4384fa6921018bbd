"""What is compared: the adapter path, merges onto either base in each format, and both bases alone.

Each is named tensors, and perhaps an adapter on top, made into a model when its turn comes. It does not know how a
merge is computed: whoever does gives the tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from adapters.merge.formats import BESIDE, FORMATS, can_hold
from adapters.merge.models import Loaded, Loading, cast, compute_type
from adapters.merge.named_tensors import Computed, NamedTensors, in_files
from adapters.merge.plan import DTYPES, STORED, Dtype
from adapters.merge.report import BASES, Part, name_of
from adapters.merge.tensors import torch_types


class Weights(Protocol):
    """Every tensor of the model, computed in fp32 when it is asked for and rounded once, to the type that is named. One
    that nothing changes may come in fewer bits, where they are all there is to it."""

    path: Path
    """Directory of the base, for its configuration and tokenizer."""
    bases: tuple[str, ...]
    """Of BASES, those that are there: a base that is published in NF4 has no original."""
    linear: frozenset[str]
    """Names of the weights that NF4 packs."""
    changed: tuple[str, ...]
    """Names of those that the merge changes."""
    config_changes: Mapping[str, Any]
    """What must be different in config.json for them."""

    def base(self, which: str, dtype: Dtype = "float32") -> NamedTensors: ...

    def merged(self, which: str, dtype: Dtype = "float32") -> NamedTensors: ...


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

    def load(self, loading: Loading, weights: Weights, adapter: Path) -> Loaded:
        given = weights.merged if self.part == "merged" else weights.base
        tensors = _stored(partial(given, self.base), self.stored, weights.linear)
        return self._made_of(tensors, loading, weights, adapter if self.part == "adapter" else None)

    def load_written(self, loading: Loading, directory: Path, dtype: str, weights: Weights) -> Loaded:
        """From the files of a merge themselves, of this type: as they lie, or as they become in the format wanted."""
        if dtype == self.stored:
            return loading.written(directory, compute_type(self.stored))
        files = in_files(directory)
        beside = _cast(files, BESIDE[self.stored])
        return self._made_of(_rounded(files, beside, self.stored, weights.linear), loading, weights)

    def _made_of(
        self, tensors: NamedTensors, loading: Loading, weights: Weights, adapter: Path | None = None
    ) -> Loaded:
        return loading.of(weights.path, tensors, compute_type(self.stored), weights.config_changes, adapter)


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


def _stored(given: Callable[[Dtype], NamedTensors], stored: str, linear: Collection[str]) -> NamedTensors:
    if stored in DTYPES:
        return given(stored)
    return _rounded(given("float32"), given(BESIDE[stored]), stored, linear)


def _rounded(exact: NamedTensors, beside: NamedTensors, stored: str, linear: Collection[str]) -> NamedTensors:
    """`beside`: the same in the type of those that NF4 cannot hold. An embedding is the largest there is, so it is not
    asked for in fp32 first."""

    def rounded(name: str) -> Tensor:
        if stored == "nf4" and name not in linear:
            return beside[name]
        tensor = exact[name]
        fits = tensor.is_floating_point() and can_hold(stored, tensor, linear=name in linear)
        return FORMATS[stored](tensor) if fits else tensor

    return Computed(exact, rounded)


def _cast(tensors: NamedTensors, dtype: Dtype) -> NamedTensors:
    return Computed(tensors, lambda name: cast(tensors[name], torch_types()[STORED[dtype]]))
