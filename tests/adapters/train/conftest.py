"""Configurations of runs on the small base, with their data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from adapters.train.config import TrainConfig, load_config

ROWS = """\
{"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Ahoy!"}]}
{"messages": [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "A sailor."}]}
{"messages": [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "At sea, far away."}]}
{"messages": [{"role": "user", "content": "When?"}, {"role": "assistant", "content": "At dawn."}]}
"""


@pytest.fixture
def write_yaml(tmp_path: Path, small_base: Path) -> Callable[..., Path]:
    """Write a configuration for the small base, with its data; sections given replace the default's keys."""

    def write(**sections: dict[str, Any]) -> Path:
        values: dict[str, dict[str, Any]] = {
            "model": {"model_name_or_path": str(small_base)},
            "data": {"train": ["rows.jsonl"], "eval_split": 0.25},
            "training": {"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-2},
            "eval": {"prompts": ["Hello there"], "max_new_tokens": 4},
            "output": {"output_dir": str(tmp_path / "out"), "name": "sailor"},
        }
        for section, keys in sections.items():
            values[section] = values.get(section, {}) | keys
        (tmp_path / "rows.jsonl").write_text(ROWS)
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
        return tmp_path / "run.yaml"

    return write


@pytest.fixture
def config(write_yaml: Callable[..., Path]) -> TrainConfig:
    return load_config(write_yaml())
