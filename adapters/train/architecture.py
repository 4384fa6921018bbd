"""A Hugging Face config.json → the shapes of the base's parameters, with nothing loaded.

Llama and what is built like it (Mistral, Qwen2, Qwen3, SmolLM) are read here. Any other architecture is built by
transformers on torch's meta device, which allocates nothing. It knows nothing of bytes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapters.errors import ConfigError

LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class Linear:
    """Modules of one name and one shape, as `q_proj` in every layer."""

    name: str
    rows: int
    """out_features"""
    columns: int
    """in_features"""
    count: int


@dataclass(frozen=True)
class Ranks:
    """Which linear modules get an adapter, and of what rank."""

    r: int
    """0: none has a rank, as of IA³ or of prompts."""
    targets: Collection[str] | None = None
    """Names of modules; None: all linear modules of the blocks."""
    pattern: Mapping[str, int] = field(default_factory=dict)
    """End of a module's name → its rank, where it is another than `r`; `layers.3.self_attn.q_proj` is of one layer."""

    def sum_over(self, linear: Linear) -> int:
        """Of all modules of this name and shape."""
        total = self.r * linear.count
        for key, rank in self.pattern.items():
            *path, name = key.split(".")
            if name == linear.name:
                total += (rank - self.r) * (1 if any(part.isdigit() for part in path) else linear.count)
        return total


@dataclass(frozen=True)
class Architecture:
    layers: int
    hidden: int
    intermediate: int
    heads: int
    key_value_heads: int
    head_width: int
    vocabulary: int
    linears: tuple[Linear, ...]
    """Of the blocks; the embedding and the lm_head are none of them."""
    embedding: int
    """Parameters of the token embedding, and of an lm_head that is not tied to it: never quantised here."""
    rest: int
    """Norms and biases."""

    @property
    def linear(self) -> int:
        """Parameters of all linear modules in the blocks: what NF4 quantises."""
        return sum(each.rows * each.columns * each.count for each in self.linears)

    @property
    def parameters(self) -> int:
        return self.linear + self.embedding + self.rest

    def targeted(self, targets: Collection[str] | None) -> tuple[Linear, ...]:
        """The linear modules of these names; None: all of them. Raises ConfigError for a name that it does not have."""
        known = dict.fromkeys(each.name for each in self.linears)
        if unknown := sorted(set(targets or ()) - set(known)):
            raise ConfigError(f"peft.target_modules: this base has no {', '.join(unknown)}; it has {', '.join(known)}")
        return tuple(each for each in self.linears if targets is None or each.name in targets)

    def adapter_parameters(self, ranks: Ranks) -> int:
        """LoRA (Hu et al. 2021, section 4.1): a weight of d × k gets r · (d + k)."""
        return sum(ranks.sum_over(each) * (each.rows + each.columns) for each in self.targeted(ranks.targets))

    def rank_sum(self, ranks: Ranks) -> int:
        """Of all adapted modules."""
        return sum(ranks.sum_over(each) for each in self.targeted(ranks.targets))


def read_config(path: Path) -> dict[str, Any]:
    """A config.json, or the one in a model directory."""
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: expected a Hugging Face config.json, but it cannot be read: {error}") from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise ConfigError(f"{file}: expected a Hugging Face config.json, but it has no model_type")
    return config


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    if config.get("is_encoder_decoder"):
        raise ConfigError(
            f"config.json: a {config['model_type']!r} is an encoder and a decoder; expected a model that is a decoder "
            "alone, as what is trained here is served by continuing a prompt"
        )
    if config["model_type"] in LLAMA_LIKE:
        return _llama_like(config)
    return built_on_meta(config)


def _llama_like(config: Mapping[str, Any]) -> Architecture:
    try:
        hidden, layers = int(config["hidden_size"]), int(config["num_hidden_layers"])
        heads, inner = int(config["num_attention_heads"]), int(config["intermediate_size"])
        vocabulary = int(config["vocab_size"])
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"config.json: {error} is missing or no number, so its parameters cannot be counted"
        ) from None
    width = int(config.get("head_dim") or hidden // heads)
    shared = int(config.get("num_key_value_heads") or heads)
    shapes = {
        "q_proj": (heads * width, hidden),
        "k_proj": (shared * width, hidden),
        "v_proj": (shared * width, hidden),
        "o_proj": (hidden, heads * width),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
    }
    norms = 2 * hidden + (2 * width if config["model_type"] == "qwen3" else 0)
    tied = bool(config.get("tie_word_embeddings", False))
    return Architecture(
        layers=layers,
        hidden=hidden,
        intermediate=inner,
        heads=heads,
        key_value_heads=shared,
        head_width=width,
        vocabulary=vocabulary,
        linears=tuple(Linear(name, *shape, layers) for name, shape in shapes.items()),
        embedding=vocabulary * hidden * (1 if tied else 2),
        rest=layers * (norms + _biases(config, shapes)) + hidden,
    )


def _biases(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, int]]) -> int:
    """Of one layer. Qwen2 has them on q, k and v whatever its configuration says."""
    attention, mlp = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
    biased: tuple[str, ...] = attention if config.get("attention_bias") else ()
    if config["model_type"] == "qwen2":
        biased = attention[:3]
    if config.get("mlp_bias"):
        biased += mlp
    return sum(shapes[name][0] for name in biased)


def built_on_meta(config: Mapping[str, Any]) -> Architecture:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        settings = AutoConfig.for_model(**config)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(settings)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = str(error).partition("\n")[0]  # the other lines list what transformers knows
        raise ConfigError(
            f"config.json: transformers cannot build a {config['model_type']!r} from it: {reason}"
        ) from error
    text = settings.get_text_config()
    outside = {id(module) for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    found = Counter(
        (name.rpartition(".")[2], *_shape(module))
        for name, module in model.named_modules()
        if id(module) not in outside and _is_linear(module)
    )
    linears = tuple(Linear(*key, count) for key, count in found.items())
    total = sum({id(each): each.numel() for each in model.parameters()}.values())
    embedding = sum(
        {
            id(each): each.numel()
            for module in model.modules()
            if id(module) in outside
            for each in module.parameters()
        }.values()
    )
    linear = sum(each.rows * each.columns * each.count for each in linears)
    heads = int(text.num_attention_heads)
    return Architecture(
        layers=int(text.num_hidden_layers),
        hidden=int(text.hidden_size),
        intermediate=int(getattr(text, "intermediate_size", None) or 4 * text.hidden_size),
        heads=heads,
        key_value_heads=int(getattr(text, "num_key_value_heads", None) or heads),
        head_width=int(getattr(text, "head_dim", None) or text.hidden_size // heads),
        vocabulary=int(text.vocab_size),
        linears=linears,
        embedding=embedding,
        rest=total - embedding - linear,
    )


def _is_linear(module: Any) -> bool:
    return type(module).__name__ in ("Linear", "Conv1D")


def _shape(module: Any) -> tuple[int, int]:
    """out, in. transformers' Conv1D, of GPT-2 and its kin, keeps its weight the other way round."""
    rows, columns = (int(size) for size in module.weight.shape)
    return (columns, rows) if type(module).__name__ == "Conv1D" else (rows, columns)
