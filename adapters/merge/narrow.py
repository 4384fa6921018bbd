"""Embedding and head, the largest tensors of most models, as narrow as they lie: what computes gets a little in fp32.

Rows of an embedding are widened when they are looked up, and a head slice by slice; no bit of a value changes by it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Embedding, Linear
from torch.nn.functional import embedding, linear

SLICE_BYTES = 4 << 20
"""Of a head in fp32 at once."""


class Narrow:
    """Computes in place of a module, with a weight of its own."""

    def __init__(self, compute: Callable[[Tensor, Tensor, torch.dtype], Tensor], dtype: torch.dtype) -> None:
        self._weight: Tensor | None = None
        self._compute = compute
        self._dtype = dtype

    def hold(self, weight: Tensor) -> None:
        is_exact = torch.promote_types(weight.dtype, self._dtype) == self._dtype
        self._weight = weight if is_exact else weight.to(self._dtype)

    def __call__(self, given: Tensor) -> Tensor:
        assert self._weight is not None
        return self._compute(given, self._weight, self._dtype)


def narrow_of(module: Any) -> Narrow | None:
    """None for what computes in a way of its own, as a layer of an adapter does, or a scaled embedding."""
    if type(module) is Embedding and module.max_norm is None:
        return Narrow(_looked_up, module.weight.dtype)
    if type(module) is Linear and module.bias is None:
        return Narrow(_multiplied, module.weight.dtype)
    return None


def _looked_up(ids: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    return embedding(ids, weight).to(dtype)


def _multiplied(hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    words, width = weight.shape
    rows = max(1, SLICE_BYTES // (4 * width))
    found = hidden.new_empty((*hidden.shape[:-1], words))
    wide = torch.empty((min(rows, words), width), dtype=dtype)
    for part, out in zip(weight.split(rows), found.split(rows, dim=-1), strict=True):
        out.copy_(linear(hidden, wide[: len(part)].copy_(part)))
    return found
