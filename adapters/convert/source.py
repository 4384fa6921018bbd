"""An adapter as it was sent: its configuration, its tensors by module and part, and the base it belongs to.

It reads values one tensor at a time, when asked; names and shapes are compared with the base before.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from adapters.base import BaseModel
from adapters.base_weights import BaseWeights
from adapters.json_document import read_document
from adapters.lora_weights import read_spans
from adapters.refusals import refuse
from adapters.safetensors_header import TensorSpan
from adapters.tensor_values import READABLE, Matrix, read_in_parts, read_values
from adapters.upload import CONFIG, WEIGHTS

PREFIX = "base_model.model."
Parts = Mapping[str, TensorSpan]


@dataclass(frozen=True)
class Source:
    base: BaseModel
    weights: Path
    config: Mapping[str, Any]
    spans: Mapping[str, TensorSpan]
    """By the tensor's name without PEFT's prefix."""
    beneath: BaseWeights | None = None
    """The values of the base that it is put on, where they are not those that lie there: 4-bit ones."""

    @classmethod
    def read(cls, staged: Path, base: BaseModel, prefix: str = "", beneath: BaseWeights | None = None) -> Source:
        """`prefix`: of the names of its two files."""
        weights = staged / f"{prefix}{WEIGHTS}"
        return cls(base, weights, read_document(staged / f"{prefix}{CONFIG}"), _spans(weights, base), beneath)

    def beside(self, weights: Path) -> Source:
        """Another file of weights that the same configuration describes."""
        return replace(self, weights=weights, spans=_spans(weights, self.base))

    @cached_property
    def base_weights(self) -> BaseWeights:
        return BaseWeights(self.base)

    @property
    def weights_beneath(self) -> BaseWeights:
        return self.beneath or self.base_weights

    @property
    def kind(self) -> str:
        """PEFT's `peft_type` in upper case; where none is given it means LoRA."""
        return str(self.config.get("peft_type", "LORA")).upper()

    def modules(self, pattern: re.Pattern[str], what: str) -> dict[str, dict[str, TensorSpan]]:
        """Module of the base → its parts, for a pattern with the groups `module` and `part`; every tensor matches."""
        found: dict[str, dict[str, TensorSpan]] = {}
        for name, span in self.spans.items():
            match = pattern.fullmatch(name)
            if match is None:
                raise refuse("unsupported_tensor", f"tensor {name[:200]!r} is not part of {what}")
            self.require_module(match["module"])
            found.setdefault(match["module"], {})[match["part"]] = span
        if not found:
            raise refuse("no_modules", f"{self.weights.name} has no tensor for any module of {self.base.name}")
        return found

    def require_module(self, module: str) -> None:
        if module not in self.base.modules:
            raise refuse("unknown_module", f"{module[:200]!r} is not a linear module of {self.base.name}")

    def values(self, span: TensorSpan) -> Matrix:
        """Raises InvalidAdapter for a type that is not read and for values that are not finite."""
        _require_readable(span)
        return _finite(read_values(self.weights, span))

    def parts(self, span: TensorSpan) -> Iterator[Matrix]:
        """The same in a row, a few millions at a time."""
        _require_readable(span)
        return map(_finite, read_in_parts(self.weights, span))


def _require_readable(span: TensorSpan) -> None:
    if span.dtype not in READABLE:
        raise refuse("unsupported_dtype", f"a tensor is {span.dtype}")


def _finite(values: Matrix) -> Matrix:
    if not np.isfinite(values).all():
        raise refuse("non_finite", "a tensor has values that are not finite")
    return values


def _spans(weights: Path, base: BaseModel) -> dict[str, TensorSpan]:
    spans: dict[str, TensorSpan] = {}
    for name, span in read_spans(weights, base).items():
        if spans.setdefault(name.removeprefix(PREFIX), span) is not span:
            raise refuse("unsupported_tensor", f"{name[:200]!r} is there with and without {PREFIX}")
    return spans


def require_parts(module: str, parts: Parts, names: Collection[str]) -> None:
    missing = [name for name in names if name not in parts]
    if missing:
        raise refuse("unpaired", f"{module[:200]!r} has no {missing[0]}")


def require_shapes(module: str, parts: Parts, shapes: Mapping[str, tuple[int, ...]]) -> None:
    for name, shape in shapes.items():
        if parts[name].shape != shape:
            raise refuse("shape_mismatch", f"{module}: {name} is {parts[name].shape}, expected {shape}")
