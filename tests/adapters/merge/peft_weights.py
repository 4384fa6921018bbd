"""Merges as PEFT computes them, the whole model in memory: what the report is tested with, and a merge against."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from adapters.base import WEIGHT, BaseModel
from adapters.base_weights import BaseWeights
from adapters.merge.formats import nf4
from adapters.merge.models import dense_model
from adapters.merge.named_tensors import Computed, NamedTensors
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
        self.linear = frozenset(module + WEIGHT for module in self._base.modules)

    def base(self, which: str) -> NamedTensors:
        return Computed(sorted(BaseWeights(self._base).spans), lambda name: self._value(which, name))

    def merged(self, which: str) -> NamedTensors:
        model = dense_model(self.path, self.base(which), self._torch.float32)
        merged = with_adapter(model, self._adapter, self.path).merge_and_unload().state_dict()
        return {name: merged[name] for name in self.base(which)}

    def _value(self, which: str, name: str) -> Tensor:
        values = self._torch.from_numpy(BaseWeights(self._base).values(name))
        return nf4(values) if which == "dequantized" and name in self.linear else values
