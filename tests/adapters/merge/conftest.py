"""A random base that is surer of its words than the usual small one, and a random adapter on it, as files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def sure_base(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the demo base's tokenizer and chat template. Every width is a multiple of the NF4 block."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("bases") / "sure"
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def sure_adapter(sure_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its loraplex.json says that it was trained on NF4."""
    path = random_adapter(sure_base, tmp_path_factory.mktemp("adapters") / "pilot", target_modules="all-linear")
    (path / "loraplex.json").write_text(json.dumps({"quantization": {"load_in_4bit": True}}))
    return path


def random_adapter(base: Path, path: Path, **config: Any) -> Path:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(plain, LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=4, **config))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(path, save_embedding_layers=False)
    return path
