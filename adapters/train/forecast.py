"""What a configuration will hold in memory, as full fine-tuning, LoRA and QLoRA, and whether that fits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adapters.errors import WouldNotFit
from adapters.train.activations import Workload
from adapters.train.architecture import Architecture, Ranks, architecture_of, read_config
from adapters.train.config import TrainConfig
from adapters.train.estimate import Terms, full, lora, on_a_cpu, qlora
from adapters.train.memory import has_cuda

LOGIT_CHUNK_BYTES = 32 << 20
"""As in head_loss.py, which needs torch."""
BEHIND_THE_HEAD = ("final_logit_softcapping", "logit_scale", "logits_scaling")
"""Keys of a config.json whose models do something to their logits: head_loss.py does not take those in chunks."""
FULL, LORA, QLORA = "full fine-tuning", "LoRA", "QLoRA"


@dataclass(frozen=True)
class Forecast:
    architecture: Architecture
    load: Workload
    terms: Mapping[str, Terms]
    """By method: FULL, LORA, QLORA."""
    chosen: str
    """The one that the configuration asks for."""
    trained: int
    """Parameters of the adapter."""

    @property
    def total(self) -> int:
        return self.terms[self.chosen].total

    @property
    def needed(self) -> int:
        """Without what the kernel takes back where memory is short."""
        return self.terms[self.chosen].needed


def forecast(config: TrainConfig, longest_row: int | None = None) -> Forecast:
    """`longest_row`: tokens; by default `data.max_length`, which no row exceeds."""
    described = read_config(config.model.model_name_or_path)
    architecture = architecture_of(described)
    load = workload(config, described, architecture.vocabulary, longest_row)
    ranks = ranks_of(config, architecture)
    double = config.quantization.bnb_4bit_use_double_quant
    terms = {
        FULL: full(architecture, load),
        LORA: lora(architecture, load, ranks),
        QLORA: qlora(architecture, load, ranks, double=double),
    }
    if not has_cuda():
        file_bytes = architecture.parameters * _stored_bytes(described)
        input_bytes = load.batch * load.tokens * architecture.hidden * load.compute_bytes
        terms = {name: on_a_cpu(each, file_bytes, input_bytes) for name, each in terms.items()}
    return Forecast(
        architecture=architecture,
        load=load,
        terms=terms,
        chosen=QLORA if config.quantization.load_in_4bit else LORA,
        trained=architecture.adapter_parameters(ranks),
    )


def ranks_of(config: TrainConfig, architecture: Architecture) -> Ranks:
    named = config.peft.modules_for_peft()
    targets = named if isinstance(named, list) else None
    return Ranks(config.peft.rank(architecture.parameters), targets, config.peft.rank_pattern)


def workload(
    config: TrainConfig, described: Mapping[str, Any], vocabulary: int, longest_row: int | None = None
) -> Workload:
    chunk = max(1, LOGIT_CHUNK_BYTES // (4 * vocabulary))
    return Workload(
        batch=config.training.per_device_train_batch_size,
        tokens=min(longest_row or config.data.max_length, config.data.max_length),
        checkpointing=config.training.gradient_checkpointing,
        optimizer=_optimizer(config),
        dropout=config.peft.lora_dropout > 0,
        compute_bytes=_compute_bytes(config.model.dtype),
        logit_rows=None if any(described.get(key) for key in BEHIND_THE_HEAD) else chunk,
        fp32_products=config.peft.method == "adalora" or config.peft.use_dora,
        importance=config.peft.method == "adalora",
    )


def require_fit(found: Forecast, limit: int, *, ignore: bool = False) -> None:
    """Raises WouldNotFit."""
    if found.needed > limit and not ignore:
        raise WouldNotFit(f"{too_much(found, limit)}, or run with --ignore-memory")


def too_much(found: Forecast, limit: int) -> str:
    terms = {name: value for name, value in vars(found.terms[found.chosen]).items() if name != "loading"}
    largest = max(terms, key=terms.__getitem__).replace("_", " ")
    checkpoint = "" if found.load.checkpointing else ", set training.gradient_checkpointing=true"
    return (
        f"{found.chosen} of this base would take about {found.needed / 1e9:.1f} GB, there are {limit / 1e9:.1f} GB; "
        f"most of it are {largest}. Lower training.per_device_train_batch_size ({found.load.batch}) or "
        f"data.max_length ({found.load.tokens} tokens in the longest row){checkpoint}"
    )


def _optimizer(config: TrainConfig) -> str:
    """As optimizers.py resolves `auto`, which needs to know the device."""
    if config.training.optim != "auto":
        return config.training.optim
    return "paged_adamw_8bit" if config.quantization.load_in_4bit and has_cuda() else "adamw_torch"


def _stored_bytes(described: Mapping[str, Any]) -> int:
    """Bytes of a parameter in the checkpoint, as its configuration says."""
    return 4 if (described.get("dtype") or described.get("torch_dtype")) == "float32" else 2


def _compute_bytes(dtype: str) -> int:
    if dtype == "auto":
        try:
            from adapters.processor import multiplies_bf16

            return 2 if multiplies_bf16() else 4
        except ImportError:
            return 2
    return {"bfloat16": 2, "float32": 4}[dtype]
