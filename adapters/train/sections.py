"""The sections of a training configuration, a field a key of the YAML file; `config.py` reads them.

Field names are those of peft and transformers. It knows nothing of torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import MinLen
from pydantic import BaseModel, ConfigDict, Field

from adapters.names import NAME

TARGET_PRESETS: Mapping[str, tuple[str, ...]] = {
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "attention-qv": ("q_proj", "v_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), use_attribute_docstrings=True)


class ModelSection(Section):
    model_name_or_path: Path
    """Directory of the base in Hugging Face form, relative to where the command runs."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Compute type, and storage type of everything that is not quantised. `auto` is bfloat16 where the processor has
    instructions for it, else float32: emulated bfloat16 made a step of 2 s take 50 s."""


class QuantizationSection(Section):
    """Defaults equal what the server does in flight, so that an adapter is trained on what it will be served on."""

    load_in_4bit: bool = True
    bnb_4bit_quant_type: Literal["nf4"] = "nf4"
    bnb_4bit_use_double_quant: bool = True
    bnb_4bit_compute_dtype: Literal["bfloat16", "float32"] | None = None
    """By default `model.dtype`."""


class PeftSection(Section):
    method: Literal["lora"] = "lora"
    r: int = Field(default=8, ge=1, le=512)
    lora_alpha: int = Field(default=16, ge=1)
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: Literal["attention", "attention-qv", "mlp", "all-linear"] | tuple[str, ...] = "all-linear"

    def modules_for_peft(self) -> list[str] | str:
        """peft finds `all-linear` itself in any architecture, leaving out the lm_head."""
        if isinstance(self.target_modules, str):
            return list(TARGET_PRESETS.get(self.target_modules, ())) or self.target_modules
        return list(self.target_modules)


class DataSection(Section):
    train: Annotated[tuple[Path, ...], MinLen(1)]
    """JSONL files, one conversation a line under `messages`; relative to the YAML file."""
    eval_split: float = Field(default=0.1, gt=0, lt=1)
    """Share of the conversations held out, chosen by the hash of the conversation."""
    max_length: int = Field(default=512, ge=16)


class TrainingSection(Section):
    max_steps: int = Field(ge=1)
    per_device_train_batch_size: int = Field(default=8, ge=1)
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    learning_rate: float = Field(default=2e-4, gt=0)
    warmup_steps: int = Field(default=3, ge=0)
    """Linear warm-up, then a cosine down to a tenth of the learning rate."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    seed: int = 42


class EvalSection(Section):
    prompts: tuple[str, ...] = ()
    """Asked before and after training, greedily; keep them out of the data."""
    max_new_tokens: int = Field(default=64, ge=1)


class OutputSection(Section):
    output_dir: Path
    """Becomes the PEFT directory; an older one is replaced when the run has ended well."""
    name: str = Field(pattern=rf"^{NAME.pattern}$")
    max_lora_rank: int = Field(default=16, ge=1)
    """The largest rank the server takes (its `max_lora_rank`); the finished adapter is checked against it."""
    description: str = ""
