"""Random LoRA adapters in PEFT's format for any base, without training: strong enough to change every answer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from adapters.base import BaseModel


def write_adapter(destination: Path, base: BaseModel, *, rank: int, seed: int, strength: float = 0.4) -> Path:
    """All linear modules, alpha = 2·rank; standard deviations 1/√in_features for A and strength/√rank for B."""
    random = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}
    for module, (out_features, in_features) in base.modules.items():
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
        "target_modules": sorted({module.rpartition(".")[2] for module in base.modules}),
        "bias": "none",
    }
    (destination / "adapter_config.json").write_text(json.dumps(config, indent=2))
    return destination
