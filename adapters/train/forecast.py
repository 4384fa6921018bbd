"""What a configuration will hold in memory, as full fine-tuning, LoRA and QLoRA, and whether that fits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from adapters.errors import WouldNotFit
from adapters.train.architecture import Architecture, architecture_of, read_config
from adapters.train.config import TrainConfig
from adapters.train.estimate import Terms, Workload, full, lora, qlora
from adapters.train.memory import has_cuda

LOGIT_CHUNK_BYTES = 32 << 20
"""As in head_loss.py, which needs torch."""
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


def forecast(config: TrainConfig, longest_row: int | None = None) -> Forecast:
    """`longest_row`: tokens; by default `data.max_length`, which no row exceeds."""
    architecture = architecture_of(read_config(config.model.model_name_or_path))
    load, targets = workload(config, architecture.vocabulary, longest_row), _targets(config)
    r = config.peft.rank(architecture.parameters)  # 0 for IA³ and prompts: a few vectors
    double = config.quantization.bnb_4bit_use_double_quant
    return Forecast(
        architecture=architecture,
        load=load,
        terms={
            FULL: full(architecture, load),
            LORA: lora(architecture, load, r, targets),
            QLORA: qlora(architecture, load, r, targets, double=double),
        },
        chosen=QLORA if config.quantization.load_in_4bit else LORA,
        trained=architecture.adapter_parameters(r, targets),
    )


def workload(config: TrainConfig, vocabulary: int, longest_row: int | None = None) -> Workload:
    return Workload(
        batch=config.training.per_device_train_batch_size,
        tokens=min(longest_row or config.data.max_length, config.data.max_length),
        checkpointing=config.training.gradient_checkpointing,
        optimizer=_optimizer(config),
        dropout=config.peft.lora_dropout > 0,
        compute_bytes=_compute_bytes(config.model.dtype),
        logit_rows=max(1, LOGIT_CHUNK_BYTES // (4 * vocabulary)),
    )


def require_fit(found: Forecast, limit: int, *, ignore: bool = False) -> None:
    """Raises WouldNotFit."""
    if found.total > limit and not ignore:
        terms = found.terms[found.chosen]
        largest = max(vars(terms), key=vars(terms).__getitem__).replace("_", " ")
        raise WouldNotFit(
            f"{found.chosen} of this base would take about {found.total / 1e9:.1f} GB, there are {limit / 1e9:.1f} GB; "
            f"most of it are {largest}. Lower training.per_device_train_batch_size ({found.load.batch}) or "
            f"data.max_length ({found.load.tokens}), or run with --ignore-memory"
        )


def _targets(config: TrainConfig) -> list[str] | None:
    """None: every linear module of the blocks."""
    named = config.peft.modules_for_peft()
    return named if isinstance(named, list) else None


def _optimizer(config: TrainConfig) -> str:
    """As optimizers.py resolves `auto`, which needs to know the device."""
    if config.training.optim != "auto":
        return config.training.optim
    return "paged_adamw_8bit" if config.quantization.load_in_4bit and has_cuda() else "adamw_torch"


def _compute_bytes(dtype: str) -> int:
    if dtype == "auto":
        try:
            from adapters.processor import multiplies_bf16

            return 2 if multiplies_bf16() else 4
        except ImportError:
            return 2
    return {"bfloat16": 2, "float32": 4}[dtype]
