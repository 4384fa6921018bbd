"""Merges as PEFT computes them, the whole model in memory: what the report is tested with, and a merge against."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from adapters.base import WEIGHT, BaseModel
from adapters.base_weights import BaseWeights
from adapters.merge.formats import nf4
from adapters.merge.models import dense_model
from adapters.merge.report import BASES
from adapters.merge.unmerged import with_adapter


class PeftWeights:
    def __init__(self, base: Path, adapter: Path) -> None:
        import torch

        self._torch = torch
        self._adapter = adapter
        self.path = base
        self._base = BaseModel.read(base)
        self.config_changes: Mapping[str, Any] = {}
        self.bases = BASES
        self.count = len(BaseWeights(self._base).spans)
        self.linear = frozenset(module + WEIGHT for module in self._base.modules)

    def base(self, which: str) -> Iterator[tuple[str, Tensor]]:
        weights = BaseWeights(self._base)
        for name in sorted(weights.spans):
            values = self._torch.from_numpy(weights.values(name))
            yield name, nf4(values) if which == "dequantized" and name in self.linear else values

    def merged(self, which: str) -> Iterator[tuple[str, Tensor]]:
        model = dense_model(self.path, self.base(which), self._torch.float32)
        merged = with_adapter(model, self._adapter, self.path).merge_and_unload().state_dict()
        yield from ((name, merged[name]) for name in sorted(BaseWeights(self._base).spans))
