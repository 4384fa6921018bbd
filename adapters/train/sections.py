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
    max_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps; counts instead of `num_train_epochs` where it is given."""
    num_train_epochs: float = Field(default=3, gt=0)
    """Passes over the training data."""
    per_device_train_batch_size: int = Field(default=8, ge=1)
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    learning_rate: float = Field(default=2e-4, gt=0)
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    """After the warm-up; a cosine and a line end at a tenth of the learning rate."""
    warmup_steps: float = Field(default=3, ge=0)
    """Linear warm-up; below 1 it is a share of the run, as 0.03."""
    optim: Literal["auto", "adamw_torch", "adamw_8bit", "paged_adamw_8bit", "lion_8bit"] = "auto"
    """`auto` is adamw_torch, on a GPU with a 4-bit base paged_adamw_8bit. 8 bits save three quarters of the optimizer's
    memory, which is little beside a LoRA, and cost a CPU several times its time. Lion wants a tenth of the rate."""
    gradient_checkpointing: bool = False
    """Computes each layer twice and keeps its activations once: about a quarter slower, far less memory."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    seed: int = 42


class EvalSection(Section):
    eval_steps: Literal["auto", "never"] | Annotated[int, Field(ge=1)] = "auto"
    """Steps between two looks at the held-out loss, during training. `auto` looks 4 to 20 times. The weights with the
    lowest loss are what is saved."""
    early_stopping_patience: int | None = Field(default=3, ge=1)
    """Stop after so many looks in a row that found no lower loss; null never does."""
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
    save_steps: Literal["auto", "never"] | Annotated[int, Field(ge=1)] = "auto"
    """Steps between two checkpoints. `auto` makes 4 to 20."""
    save_total_limit: int = Field(default=2, ge=1)
    """Checkpoints kept while the run goes on; when it has ended well they are removed."""
    resume: Literal["auto", "never"] = "auto"
    """`auto` goes on from the last whole checkpoint of an earlier, unfinished run; `never` starts anew."""
