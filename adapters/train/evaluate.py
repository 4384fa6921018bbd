"""What training changed: loss on held-out conversations and answers to prompts, of the base and of the adapter.

It leaves the model in training mode, with its adapter on, as it found it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from adapters.train.formats import Message
from adapters.train.labels import Example
from adapters.train.methods import base_alone
from adapters.train.model import collate, loss_sum
from adapters.train.sections import EvalSection


@dataclass(frozen=True)
class Verdict:
    held_out_base: float
    held_out_adapter: float
    prompts: tuple[str, ...]
    before: tuple[str, ...]
    after: tuple[str, ...]
    general_base: float | None = None
    """Loss on the general set; None where there is none."""
    general_adapter: float | None = None

    @property
    def forgotten(self) -> float | None:
        """Nats per token that general data cost more with the adapter than without; below zero nothing was lost."""
        if self.general_base is None or self.general_adapter is None:
            return None
        return self.general_adapter - self.general_base


@dataclass(frozen=True)
class Losses:
    """Nats per trained token."""

    held_out: float
    general: float | None
    """On data that the run is not about; None where there is none."""


@contextmanager
def _evaluating(model: Any, *, base: bool) -> Iterator[None]:
    model.eval()
    try:
        with torch.no_grad(), base_alone(model) if base else nullcontext():
            yield
    finally:
        model.train()


def losses(
    model: Any, held_out: Sequence[Example], general: Sequence[Example], pad: int, size: int, *, base: bool = False
) -> Losses:
    return Losses(
        held_out_loss(model, held_out, pad, size, base=base),
        held_out_loss(model, general, pad, size, base=base) if general else None,
    )


def held_out_loss(model: Any, examples: Sequence[Example], pad: int, size: int, *, base: bool = False) -> float:
    """Mean cross-entropy in nats per trained token; with `base` the adapter is switched off."""
    batches = [collate(examples[i : i + size], pad) for i in range(0, len(examples), size)]
    with _evaluating(model, base=base):
        total = sum(float(loss_sum(model, batch)) for batch in batches)
    return total / sum(example.trained_tokens for example in examples)


def answers(model: Any, tokenizer: Any, section: EvalSection, *, base: bool = False) -> list[str]:
    """Greedy answers to the prompts of the configuration, in one batch; continuations where there is no template."""
    if not section.prompts:
        return []
    if tokenizer.chat_template:
        chats = [[{"role": "user", "content": prompt}] for prompt in section.prompts]
        return replies(model, tokenizer, chats, section.max_new_tokens, base=base)
    tokenizer.padding_side = "left"
    inputs = tokenizer(list(section.prompts), padding=True, return_tensors="pt")
    return _generated(model, tokenizer, inputs, section.max_new_tokens, base=base)


def replies(
    model: Any, tokenizer: Any, chats: Sequence[Sequence[Message]], max_new_tokens: int, *, base: bool = False
) -> list[str]:
    """Greedy answers to the last message of every chat, all in one batch; with `base` the adapter is switched off."""
    tokenizer.padding_side = "left"
    inputs = tokenizer.apply_chat_template(
        [list(chat) for chat in chats],
        add_generation_prompt=True,
        padding=True,
        return_tensors="pt",
        return_dict=True,
    )
    return _generated(model, tokenizer, inputs, max_new_tokens, base=base)


@contextmanager
def _whole_rows(model: Any) -> Iterator[None]:
    """`generate` gives the head the last token of every row, a view, and torch then copies the head's weights for each
    row: 57 MB a prompt with the demo base, a gigabyte with one of 8 B."""
    head = getattr(model, "get_base_model", lambda: model)().get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(), *inputs[1:]))
    try:
        yield
    finally:
        hook.remove()


def _generated(model: Any, tokenizer: Any, inputs: Any, max_new_tokens: int, *, base: bool) -> list[str]:
    with _evaluating(model, base=base), _whole_rows(model):
        outputs = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, use_cache=True)
    asked = inputs["input_ids"].shape[1]
    return [tokenizer.decode(row[asked:], skip_special_tokens=True).strip() for row in outputs]
