"""What must be the same for a run to go on where it stopped: the settings that change weights, the data, the base.

What a run is called, where it is written and what it is asked before and after may change.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from adapters.base import BaseModel
from adapters.train.config import TrainConfig, with_files
from adapters.train.labels import Example
from adapters.train.model import compute_dtype
from adapters.train.prepare import Prepared

FREE: Mapping[str, Any] = {
    "model": {"model_name_or_path"},
    "data": {"train"},
    "eval": {"prompts", "max_new_tokens"},
    "output": True,
}


def identity(config: TrainConfig, data: Prepared) -> dict[str, str]:
    anywhere: TrainConfig = with_files(config, lambda file: Path("anywhere"))
    values = anywhere.model_dump(mode="json", exclude=dict(FREE))
    return _flat(values) | {
        "base": BaseModel.read(config.model.model_name_or_path).fingerprint,
        "dtype": str(compute_dtype(config.model)),
        "training data": _digest(data.epoch),
        "held-out data": _digest(data.held_out),
        "general data": _digest(data.general),
    }


def _digest(examples: Iterable[Example]) -> str:
    """Of tokens and labels, in order: what the loop sees, whatever files and template it came from."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(array("q", [len(example.ids), *example.ids, *example.labels]).tobytes())
    return digest.hexdigest()[:16]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """{"a": {"b": 1}} → {"a.b": "1"}"""
    found: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = json.dumps(value)
    return found
