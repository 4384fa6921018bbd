"""Adapters and bases so small that the merged weights are known without computing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from adapters.base import BaseModel
from tests.adapters.factories import AdapterFiles, Tensor, base_tensors, lora_config, tensor, write_base

Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"


def base_of_ones(root: Path, changed: Mapping[str, Tensor] | None = None, **config: Any) -> BaseModel:
    """Every weight is 1, in bfloat16, but for what is `changed`."""
    ones = {name: tensor(np.ones(each.shape), each.dtype) for name, each in base_tensors().items()}
    return BaseModel.read(write_base(root / "ones", {**ones, **(changed or {})}, **config))


def written(directory: Path, tensors: Mapping[str, Any], **config: Any) -> Path:
    """`tensors`: by name without PEFT's prefix."""
    named = {f"base_model.model.{name}": tensor(values) for name, values in tensors.items()}
    return AdapterFiles(config=lora_config(**config), tensors=named).write(directory)


def rank_one(directory: Path, module: str = Q, *, rows: int = 8, **config: Any) -> Path:
    """ΔW is 0.5 in the first row and 0 elsewhere: alpha 1, r 1, A all 1, B 0.5 in front."""
    b = np.zeros((rows, 1))
    b[0] = 0.5
    pair = {f"{module}.lora_A.weight": np.ones((1, 8)), f"{module}.lora_B.weight": b}
    return written(directory, pair, **{"r": 1, "lora_alpha": 1, **config})
