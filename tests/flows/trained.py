"""Adapters that `adapters.train` itself makes on the base of the exact engine, in a few steps."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adapters.train.config import TrainConfig
from adapters.train.quiet import quiet_libraries

Row = Mapping[str, Any]


def write_rows(rows: Sequence[Row], path: Path) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def trained(
    base: Path, root: Path, rows: Sequence[Row], peft: Row, training: Row | None = None, *, on_nf4: bool = False
) -> Path:
    """A directory as `train run` leaves it; on NF4 the base's layers are those of bitsandbytes, computing in fp32."""
    from adapters.train.recipe import train

    steps = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 2e-2, "warmup_steps": 0}
    config = TrainConfig.model_validate(
        {
            "model": {"model_name_or_path": base, "dtype": "float32"},
            "quantization": {"load_in_4bit": on_nf4},
            "peft": peft,
            "data": {"train": [write_rows(rows, root / "rows.jsonl")], "eval_split": 0.2},
            "training": {**steps, **(training or {})},
            "eval": {"eval_steps": "never"},
            "output": {"output_dir": root / "out", "name": "trained", "save_steps": "never"},
        }
    )
    with quiet_libraries():
        return train(config).directory
