"""Adapters as PEFT writes them, with random weights strong enough that nobody mistakes one for the base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

STRENGTH = 0.3
"""Standard deviation of lora_B; lora_A keeps the size of its input."""


def write_adapter(
    folder: Path, base: dict[str, Any], seed: int, *, rank: int = 8, head: bool = False, poison: bool = False
) -> str:
    """`base` is the base model's config.json. `head` adds an lm_head LoRA, `poison` makes every lora_B NaN."""
    draw = np.random.default_rng(seed)
    tensors = {}
    for module, (inputs, outputs) in _modules(base, head).items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = draw.normal(size=(rank, inputs)) / inputs**0.5
        tensors[f"base_model.model.{module}.lora_B.weight"] = draw.normal(size=(outputs, rank)) * STRENGTH
        if poison:
            tensors[f"base_model.model.{module}.lora_B.weight"][:] = np.nan
    folder.mkdir(parents=True)
    save_file({name: value.astype(np.float32) for name, value in tensors.items()}, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj", *(["lm_head"] if head else [])],
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return str(folder)


def _modules(base: dict[str, Any], head: bool) -> dict[str, tuple[int, int]]:
    """Module name -> (inputs, outputs)."""
    hidden, inner = base["hidden_size"], base["intermediate_size"]
    narrow = hidden // base["num_attention_heads"] * base["num_key_value_heads"]
    layer = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.v_proj": (hidden, narrow),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.up_proj": (hidden, inner),
        "mlp.down_proj": (inner, hidden),
    }
    modules = {
        f"model.layers.{number}.{name}": size
        for number in range(base["num_hidden_layers"])
        for name, size in layer.items()
    }
    return {**modules, "lm_head": (hidden, base["vocab_size"])} if head else modules
