"""Random models of a few thousand weights, as files and as PEFT sees them; every width is a multiple of NF4's block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

LAYERS = 12
VOCABULARY = 128


def save_model(path: Path, *, tied: bool = True, shard_bytes: int | None = None, **config: Any) -> Path:
    """In bfloat16."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "tie_word_embeddings": tied,
        "initializer_range": 0.1,
    }
    model = LlamaForCausalLM(LlamaConfig(**{**shape, **config})).to(torch.bfloat16)
    model.save_pretrained(path, max_shard_size=shard_bytes or "5GB")
    return path


def load_model(path: Path, **options: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, **{"dtype": torch.float32, **options}).eval()


def logits(model: Any) -> Any:
    import torch

    with torch.no_grad():
        return model(input_ids=torch.arange(1, 25).reshape(2, 12)).logits.float()


def with_weights(path: Path, tensors: dict[str, Any], **config: Any) -> Any:
    """The model of `path` with other weights, which must be all of them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path, **config), dtype="float32").eval()
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    assert set(missing) <= tied
    assert not unexpected
    return model
