"""The model under training: the base as it will be served (NF4), a LoRA on top, and the loss on labelled tokens.

It knows nothing of files of data or of schedules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from adapters.errors import ConfigError
from adapters.nf4 import keep_unpacked, repair_dequantize
from adapters.processor import multiplies_bf16
from adapters.train.labels import IGNORED, Example
from adapters.train.sections import ModelSection, PeftSection, QuantizationSection


@dataclass(frozen=True)
class Batch:
    """Right-padded to its longest example; shapes [examples, tokens]."""

    ids: Tensor
    mask: Tensor
    labels: Tensor

    @property
    def tokens(self) -> int:
        return int(self.mask.sum())


def collate(examples: Sequence[Example], pad: int) -> Batch:
    width = max(len(example.ids) for example in examples)

    def padded(rows: Sequence[Sequence[int]], filler: int) -> Tensor:
        return torch.tensor([[*row, *[filler] * (width - len(row))] for row in rows])

    return Batch(
        ids=padded([example.ids for example in examples], pad),
        mask=padded([[1] * len(example.ids) for example in examples], 0),
        labels=padded([example.labels for example in examples], IGNORED),
    )


def load_tokenizer(section: ModelSection) -> Any:
    path = section.model_name_or_path
    if not path.is_dir():
        raise ConfigError(
            f"model.model_name_or_path: {path} is not a directory; expected a base model in Hugging Face form "
            "(`python -m adapters.demo_base` makes the demo base)"
        )
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    if not tokenizer.chat_template or not tokenizer.eos_token:
        raise ConfigError(f"{path}: the tokenizer needs a chat template and an eos token to train on conversations")
    return tokenizer


def load_base(section: ModelSection, quantization: QuantizationSection) -> Any:
    """The base, frozen. In bf16 its embeddings, norms and lm_head are what the server holds (peft would upcast)."""
    repair_dequantize()
    dtype = compute_dtype(section)
    model = AutoModelForCausalLM.from_pretrained(
        section.model_name_or_path,
        dtype=dtype,
        quantization_config=_nf4(quantization, dtype) if quantization.load_in_4bit else None,
        local_files_only=True,
    )
    keep_unpacked(model)  # an evaluation would repack the weights and silently ruin every later gradient
    model.config.use_cache = False
    return model


def compute_dtype(section: ModelSection) -> torch.dtype:
    """`auto` resolved for this machine."""
    if section.dtype != "auto":
        return {"bfloat16": torch.bfloat16, "float32": torch.float32}[section.dtype]
    return torch.bfloat16 if multiplies_bf16() else torch.float32


def _nf4(section: QuantizationSection, dtype: torch.dtype) -> BitsAndBytesConfig:
    fields = section.model_dump(exclude={"load_in_4bit"}, exclude_none=True)
    return BitsAndBytesConfig(load_in_4bit=True, **{"bnb_4bit_compute_dtype": dtype, **fields})


def attach_lora(model: Any, section: PeftSection) -> Any:
    """A is random, B is zero: before the first step the outputs equal the base's. Both are fp32."""
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=section.r,
        lora_alpha=section.lora_alpha,
        lora_dropout=section.lora_dropout,
        target_modules=section.modules_for_peft(),
    )
    return get_peft_model(model, lora)


def checkpoint_activations(model: Any) -> None:
    """Keep each layer's input only and compute the layer again in the backward pass."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def trainable(model: Any) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def loss_sum(model: Any, batch: Batch) -> Tensor:
    """Cross-entropy summed over the labelled tokens, in nats.

    Logits are computed only at positions where some row has a label: with a large vocabulary and short answers
    they are a good part of the step.
    """
    targets = batch.labels[:, 1:]
    wanted = (targets != IGNORED).any(dim=0).nonzero().squeeze(1)
    logits = model(input_ids=batch.ids, attention_mask=batch.mask, logits_to_keep=wanted).logits
    picked = targets[:, wanted]
    kept = picked != IGNORED
    return torch.nn.functional.cross_entropy(logits[kept].float(), picked[kept], reduction="sum")
