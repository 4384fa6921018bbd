"""A finished adapter on its base, offline: loss and answers on a data file, of the base and of the adapter.

The base is loaded as `loraplex.json` says that it was trained, so that the score is that of what was trained; a server
on NF4 gives the same. Knows nothing of servers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from adapters.errors import ConfigError
from adapters.json_document import read_document
from adapters.train import model as models
from adapters.train.data import Conversation
from adapters.train.evaluate import held_out_loss, replies
from adapters.train.labels import Example, encode_all
from adapters.train.provenance import PROVENANCE
from adapters.train.questions import Question
from adapters.train.sections import ModelSection, QuantizationSection

BATCH = 8
NO_LIMIT = 1 << 20
"""Tokens of a row: an evaluation cuts nothing."""


class Trial:
    """A base with an adapter on it, which can be switched off."""

    def __init__(self, adapter: Path, base: Path) -> None:
        if not (adapter / "adapter_config.json").is_file():
            raise ConfigError(f"{adapter} holds no adapter; expected a directory that save_pretrained wrote")
        from peft import PeftModel

        section, quantization = trained_on(adapter, base)
        self.tokenizer = models.load_tokenizer(section)
        self.model: Any = PeftModel.from_pretrained(models.load_base(section, quantization), str(adapter))

    def loss(self, conversations: Sequence[Conversation], *, base: bool) -> float:
        examples: list[Example] = encode_all(conversations, self.tokenizer, NO_LIMIT)
        return held_out_loss(self.model, examples, self.tokenizer.pad_token_id, BATCH, base=base)

    def answers(
        self,
        asked: Sequence[Question],
        max_new_tokens: int,
        *,
        base: bool,
        told: Callable[[int], None] = lambda count: None,
    ) -> list[str]:
        found: list[str] = []
        for start in range(0, len(asked), BATCH):
            chats = [question.chat for question in asked[start : start + BATCH]]
            found += replies(self.model, self.tokenizer, chats, max_new_tokens, base=base)
            told(len(chats))
        return found


def trained_on(adapter: Path, base: Path) -> tuple[ModelSection, QuantizationSection]:
    """As the adapter's provenance says; without one, NF4 as it is served."""
    model = ModelSection(model_name_or_path=base)
    if not (adapter / PROVENANCE).is_file():
        return model, QuantizationSection()
    record = read_document(adapter / PROVENANCE)
    lineage, quantization = record.get("lineage"), record.get("quantization")
    if isinstance(lineage, dict) and lineage.get("dtype") in ("bfloat16", "float32"):
        model = ModelSection(model_name_or_path=base, dtype=lineage["dtype"])
    if not isinstance(quantization, dict):
        return model, QuantizationSection(load_in_4bit=False)
    known = {key: value for key, value in quantization.items() if key in QuantizationSection.model_fields}
    return model, QuantizationSection.model_validate(known)
