"""The base under training, frozen and as it will be served (NF4), and the loss on labelled tokens.

It knows nothing of files of data or of schedules.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from adapters.errors import ConfigError
from adapters.nf4 import keep_unpacked
from adapters.processor import multiplies_bf16
from adapters.train.allocator import while_loading
from adapters.train.head_loss import chunked_loss, head_is_plain, without_head
from adapters.train.labels import IGNORED, Example
from adapters.train.packing import pack
from adapters.train.sections import ModelSection, QuantizationSection


@dataclass(frozen=True)
class Batch:
    """Right-padded to its longest example; shapes [examples, tokens]."""

    ids: Tensor
    mask: Tensor
    labels: Tensor
    parts: Tensor | None = None
    """Where rows are packed: which of its examples a token belongs to, from 1; 0 is padding."""

    @property
    def tokens(self) -> int:
        return int(self.mask.sum())

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What the model is called with. Packed examples have positions of their own and see only themselves."""
        if self.parts is None:
            return {"input_ids": self.ids, "attention_mask": self.mask}
        same = self.parts[:, :, None] == self.parts[:, None, :]
        begins = torch.ones_like(self.parts, dtype=torch.bool)
        begins[:, 1:] = self.parts[:, 1:] != self.parts[:, :-1]
        places = torch.arange(self.parts.shape[1], device=self.parts.device).expand_as(self.parts)
        starts = torch.where(begins, places, 0).cummax(dim=1).values
        return {"input_ids": self.ids, "attention_mask": same.tril()[:, None], "position_ids": places - starts}


def collate(examples: Sequence[Example], pad: int) -> Batch:
    width = max(len(example.ids) for example in examples)

    def padded(rows: Sequence[Sequence[int]], filler: int) -> Tensor:
        return torch.tensor([[*row, *[filler] * (width - len(row))] for row in rows])

    return Batch(
        ids=padded([example.ids for example in examples], pad),
        mask=padded([[1] * len(example.ids) for example in examples], 0),
        labels=padded([example.labels for example in examples], IGNORED),
        parts=padded([_parts(example) for example in examples], 0) if any(e.parts for e in examples) else None,
    )


def _parts(example: Example) -> list[int]:
    lengths = example.parts or (len(example.ids),)
    return [number for number, length in enumerate(lengths, start=1) for _ in range(length)]


def check_packing(model: Any, length: int) -> None:
    """ConfigError where packed examples would see each other: what one says must not change another's logits a bit."""
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    if window is not None and window < length:
        raise ConfigError(f"data.packing: this base sees {window} tokens back; set data.max_length to it, got {length}")
    second = Example((4, 5, 6, 7), (4, 5, 6, 7), False)
    packs = [pack([Example(first, first, False), second], 9)[0] for first in ((9, 8, 7, 6, 5), (5, 6, 7, 8, 9))]
    with torch.no_grad():
        one, other = (model(**collate([packed], 0).inputs).logits[0, 5:] for packed in packs)
    if not torch.equal(one, other):
        raise ConfigError("data.packing: the attention of this base mixes packed rows; set data.packing=false")


def load_tokenizer(section: ModelSection) -> Any:
    path = section.model_name_or_path
    if not path.is_dir():
        raise ConfigError(
            f"model.model_name_or_path: {path} is not a directory; expected a base model in Hugging Face form "
            "(`python -m adapters.demo_base` makes the demo base)"
        )
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    if not tokenizer.eos_token:
        raise ConfigError(f"{path}: the tokenizer needs an eos token, or the model would never learn to stop")
    return tokenizer


def load_base(section: ModelSection, quantization: QuantizationSection) -> Any:
    """The base, frozen. In bf16 its embeddings, norms and lm_head are what the server holds (peft would upcast)."""
    dtype = compute_dtype(section)
    with while_loading():
        model = AutoModelForCausalLM.from_pretrained(
            section.model_name_or_path,
            dtype=dtype,
            quantization_config=_nf4(quantization, dtype) if quantization.load_in_4bit else None,
            local_files_only=True,
        )
        if quantization.load_in_4bit:
            _let_go_of_the_file(model)
    keep_unpacked(model)  # an evaluation would repack the weights and silently ruin every later gradient
    model.config.use_cache = False
    return model


def _let_go_of_the_file(model: Any) -> None:
    """What was not packed is a view of it, and keeps all of it mapped: pages of weights that nobody reads any more."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.clone()


def compute_dtype(section: ModelSection) -> torch.dtype:
    """`auto` resolved for this machine."""
    if section.dtype != "auto":
        return {"bfloat16": torch.bfloat16, "float32": torch.float32}[section.dtype]
    return torch.bfloat16 if multiplies_bf16() else torch.float32


def _nf4(section: QuantizationSection, dtype: torch.dtype) -> BitsAndBytesConfig:
    fields = section.model_dump(exclude={"load_in_4bit"}, exclude_none=True)
    return BitsAndBytesConfig(load_in_4bit=True, **{"bnb_4bit_compute_dtype": dtype, **fields})


def checkpoint_activations(model: Any) -> None:
    """Keep each layer's input only and compute the layer again in the backward pass."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def trainable(model: Any) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def loss_sum(model: Any, batch: Batch) -> Tensor:
    """Cross-entropy summed over the labelled tokens, in nats. Logits are made of no others, and of few at a time."""
    causal = getattr(model, "get_base_model", lambda: model)()
    chunked = head_is_plain(causal)
    targets = batch.labels[:, 1:]
    wanted = (targets != IGNORED).any(dim=0).nonzero().squeeze(1)
    with without_head(causal) if chunked else nullcontext() as head:
        found = model(**batch.inputs, logits_to_keep=wanted + _put_before(model)).logits
    picked = targets[:, wanted]
    kept = picked != IGNORED
    if head is not None:
        return chunked_loss(causal, head, found[kept], picked[kept])
    return torch.nn.functional.cross_entropy(found[kept].float(), picked[kept], reduction="sum")


def _put_before(model: Any) -> int:
    """How many positions of the output belong to vectors that prompt tuning puts before the tokens."""
    config = getattr(model, "active_peft_config", None)
    if config is None or config.peft_type != "PROMPT_TUNING" or model._adapters_disabled:
        return 0
    return int(config.num_virtual_tokens)
