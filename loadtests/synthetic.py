"""Random LoRA adapters in PEFT's format for any base, without training: strong enough to change every answer."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
from rich.progress import track
from safetensors.numpy import save_file

from adapters.base import BaseModel

MANY = 50
"""From so many adapters on, a set changes the query and value projections only: it has to fit on a disk."""


def write_adapter(
    destination: Path,
    base: BaseModel,
    *,
    rank: int,
    seed: int,
    strength: float = 0.4,
    targets: Collection[str] | None = None,
) -> Path:
    """Modules whose last name part is in `targets` (None: every linear one), alpha = 2·rank.

    Standard deviations are 1/√in_features for A and strength/√rank for B.
    """
    chosen = {name: shape for name, shape in base.modules.items() if not targets or name.rpartition(".")[2] in targets}
    random = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}
    for module, (out_features, in_features) in chosen.items():
        prefix = f"base_model.model.{module}"
        a = random.standard_normal((rank, in_features), dtype=np.float32) / np.sqrt(in_features)
        tensors[f"{prefix}.lora_A.weight"] = a.astype(np.float32)
        b = random.standard_normal((out_features, rank), dtype=np.float32)
        tensors[f"{prefix}.lora_B.weight"] = b * np.float32(strength / np.sqrt(rank))
    destination.mkdir(parents=True)
    save_file(tensors, destination / "adapter_model.safetensors", metadata={"format": "pt"})
    (destination / "adapter_model.safetensors").chmod(0o644)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.name,
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": sorted({module.rpartition(".")[2] for module in chosen}),
        "bias": "none",
    }
    (destination / "adapter_config.json").write_text(json.dumps(config, indent=2))
    return destination


def write_adapters(root: Path, base: BaseModel, names: Sequence[str], *, ranks: Sequence[int]) -> dict[str, Path]:
    """One adapter a name, ranks in turn. Returns name → directory."""
    many = track(names, description="writing adapters") if len(names) > MANY else names
    targets = ("q_proj", "v_proj") if len(names) > MANY else None
    return {
        name: write_adapter(root / name, base, rank=ranks[number % len(ranks)], seed=number, targets=targets)
        for number, name in enumerate(many)
    }
