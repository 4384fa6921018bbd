"""A config.json as GGUF tells it: the architecture, the shape of every tensor it must have, and the hyper-parameters.

What llama.cpp would compute otherwise than transformers is refused here. It reads no weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from adapters.errors import NotExportable
from adapters.tensor_values import Matrix

if TYPE_CHECKING:
    from gguf import GGUFWriter


@dataclass(frozen=True)
class Architecture:
    """What differs between the families that are known here."""

    name: str
    """As GGUF calls it."""
    interleaves_rope: bool = False
    """llama.cpp rotates neighbouring values, transformers the two halves of a head: rows of q and k change places."""
    query_bias: bool = False
    head_norms: bool = False


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture("llama", interleaves_rope=True),
    "mistral": Architecture("llama", interleaves_rope=True),
    "qwen2": Architecture("qwen2", query_bias=True),
    "qwen3": Architecture("qwen3", head_norms=True),
}
"""By `model_type`. Each is compared with llama.cpp in a test."""
ROPE_TYPES = ("default", "linear", "llama3")


@dataclass(frozen=True)
class Decoder:
    """One model's numbers."""

    architecture: Architecture
    layers: int
    hidden: int
    inner: int
    heads: int
    key_value_heads: int
    head_size: int
    vocabulary: int
    context: int
    norm_epsilon: float
    rope: Mapping[str, Any]
    tied: bool
    attention_bias: bool
    mlp_bias: bool
    notes: tuple[str, ...] = ()

    @property
    def blocks(self) -> range:
        return range(self.layers)

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the checkpoint, by transformers' name, and its shape."""
        queries, keys = self.heads * self.head_size, self.key_value_heads * self.head_size
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocabulary, self.hidden),
            "model.norm.weight": (self.hidden,),
        }
        if not self.tied:
            shapes["lm_head.weight"] = (self.vocabulary, self.hidden)
        block = {
            "input_layernorm.weight": (self.hidden,),
            "post_attention_layernorm.weight": (self.hidden,),
            "self_attn.q_proj.weight": (queries, self.hidden),
            "self_attn.k_proj.weight": (keys, self.hidden),
            "self_attn.v_proj.weight": (keys, self.hidden),
            "self_attn.o_proj.weight": (self.hidden, queries),
            "mlp.gate_proj.weight": (self.inner, self.hidden),
            "mlp.up_proj.weight": (self.inner, self.hidden),
            "mlp.down_proj.weight": (self.hidden, self.inner),
        }
        with_bias = ["q_proj", "k_proj", "v_proj"] if self.attention_bias or self.architecture.query_bias else []
        with_bias += ["o_proj"] if self.attention_bias else []
        with_bias += ["gate_proj", "up_proj", "down_proj"] if self.mlp_bias else []
        for name, shape in list(block.items()):
            if name.split(".")[-2] in with_bias:
                block[name.removesuffix("weight") + "bias"] = shape[:1]
        if self.architecture.head_norms:
            block |= dict.fromkeys(("self_attn.q_norm.weight", "self_attn.k_norm.weight"), (self.head_size,))
        for number in self.blocks:
            shapes |= {f"model.layers.{number}.{name}": shape for name, shape in block.items()}
        return shapes

    def interleaved(self, name: str, values: Matrix) -> Matrix:
        """Rows of a q or k projection, its bias, or the B of a LoRA on it, in llama.cpp's order; all else as it is."""
        module = name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]
        heads = {"q_proj": self.heads, "k_proj": self.key_value_heads}.get(module)
        if heads is None or not self.architecture.interleaves_rope:
            return values
        halves = values.reshape(heads, 2, self.head_size // 2, *values.shape[1:])
        return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)

    def rope_factors(self) -> Matrix | None:
        """By how much Llama 3 slows each rotation down, after transformers' `_compute_llama3_parameters`."""
        if self.rope["rope_type"] != "llama3":
            return None
        base, factor = self.rope["rope_theta"], self.rope["factor"]
        low, high = self.rope["low_freq_factor"], self.rope["high_freq_factor"]
        context = self.rope["original_max_position_embeddings"]
        lengths = 2 * math.pi * base ** (np.arange(0, self.head_size, 2, dtype=np.float64) / self.head_size)
        share = (context / lengths - low) / (high - low)  # 0: a long wave, slowed down; 1: a short one, left alone
        blended = 1 / ((1 - share) / factor + share)
        factors = np.where(lengths < context / high, 1.0, np.where(lengths > context / low, factor, blended))
        return factors.astype(np.float32)


def read_decoder(model: Path) -> Decoder:
    """Raises NotExportable."""
    from transformers import AutoConfig

    try:
        config: dict[str, Any] = AutoConfig.from_pretrained(model, local_files_only=True).to_dict()
    except (OSError, ValueError, KeyError) as error:
        raise NotExportable(f"{model} has no config.json that transformers understands: {error}") from error
    kind = str(config.get("model_type"))
    if kind not in ARCHITECTURES:
        raise NotExportable(
            f"{model.name} is a {kind!r}, which is not written as GGUF here; known are {', '.join(ARCHITECTURES)}. "
            "Export it with --format hf and convert that with llama.cpp's convert_hf_to_gguf.py",
            code="unknown_architecture",
        )
    rope, notes = _rope(config), []
    context, window = int(config["max_position_embeddings"]), config.get("sliding_window")
    if window and config.get("use_sliding_window", True) and window < context:
        notes.append(f"llama.cpp knows no sliding window here: the context ends at the window, {window} of {context}")
        context = int(window)
    if config["hidden_act"] != "silu":
        raise NotExportable(f"{model.name} uses the activation {config['hidden_act']!r}; llama.cpp computes silu here")
    heads = int(config["num_attention_heads"])
    return Decoder(
        architecture=ARCHITECTURES[kind],
        layers=int(config["num_hidden_layers"]),
        hidden=int(config["hidden_size"]),
        inner=int(config["intermediate_size"]),
        heads=heads,
        key_value_heads=int(config.get("num_key_value_heads") or heads),
        head_size=int(config.get("head_dim") or config["hidden_size"] // heads),
        vocabulary=int(config["vocab_size"]),
        context=context,
        norm_epsilon=float(config["rms_norm_eps"]),
        rope=rope,
        tied=bool(config.get("tie_word_embeddings")),
        attention_bias=bool(config.get("attention_bias")),
        mlp_bias=bool(config.get("mlp_bias")),
        notes=tuple(notes),
    )


def _rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", **(config.get("rope_parameters") or {})}
    if rope["rope_type"] not in ROPE_TYPES:
        raise NotExportable(
            f"its positions are rotated by {rope['rope_type']!r}; written as GGUF here are {', '.join(ROPE_TYPES)}",
            code="unknown_rope",
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise NotExportable("only a part of each head is rotated, which llama.cpp does otherwise", code="unknown_rope")
    return rope


def write_hyperparameters(writer: GGUFWriter, decoder: Decoder) -> None:
    from gguf import RopeScalingType

    writer.add_block_count(decoder.layers)
    writer.add_context_length(decoder.context)
    writer.add_embedding_length(decoder.hidden)
    writer.add_feed_forward_length(decoder.inner)
    writer.add_head_count(decoder.heads)
    writer.add_head_count_kv(decoder.key_value_heads)
    writer.add_key_length(decoder.head_size)
    writer.add_value_length(decoder.head_size)
    writer.add_layer_norm_rms_eps(decoder.norm_epsilon)
    writer.add_vocab_size(decoder.vocabulary)
    writer.add_rope_dimension_count(decoder.head_size)
    writer.add_rope_freq_base(float(decoder.rope["rope_theta"]))
    if decoder.rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(decoder.rope["factor"]))
