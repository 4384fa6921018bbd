"""Factors of every module → the two files of a plain LoRA of one rank, as PEFT reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from adapters.convert.change import Factors
from adapters.convert.source import PREFIX
from adapters.refusals import refuse
from adapters.tensor_values import Matrix
from adapters.upload import CONFIG, WEIGHTS

KEPT_OPTIONS = ("base_model_name_or_path", "task_type", "peft_version", "revision", "inference_mode", "auto_mapping")


def write_plain(directory: Path, sent: Mapping[str, Any], found: Mapping[str, Factors]) -> None:
    """Scaling is 1; smaller ranks are padded with zeros. `sent`: the configuration that it comes from."""
    rank = max(factors.a.shape[0] for factors in found.values())
    tensors: dict[str, Matrix] = {}
    for module, factors in found.items():
        b, a = factors.b, factors.a
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            raise refuse("non_finite", f"what it adds to {module} is not finite in float32")
        padding = rank - a.shape[0]
        tensors[f"{PREFIX}{module}.lora_A.weight"] = np.ascontiguousarray(np.pad(a, ((0, padding), (0, 0))), np.float32)
        tensors[f"{PREFIX}{module}.lora_B.weight"] = np.ascontiguousarray(np.pad(b, ((0, 0), (0, padding))), np.float32)
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    plain = {name: sent[name] for name in KEPT_OPTIONS if sent.get(name) is not None}
    plain |= {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "init_lora_weights": True, "bias": "none"}
    plain["target_modules"] = sorted({module.rpartition(".")[2] for module in found})
    (directory / CONFIG).write_text(json.dumps(plain, indent=2))
