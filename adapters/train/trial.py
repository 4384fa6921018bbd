"""What training made, offline: loss and answers on a data file, of it and of its base.

An adapter's base is loaded as `loraplex.json` says that it was trained, so that the score is that of what was trained;
a server on NF4 gives the same. A merged model is loaded as it lies there, and so is its base. Knows nothing of servers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from adapters.base import CONFIG
from adapters.errors import ConfigError
from adapters.json_document import read_document
from adapters.train import model as models
from adapters.train.data import Conversation
from adapters.train.evaluate import held_out_loss, replies
from adapters.train.labels import Example, encode_all
from adapters.train.provenance import PROVENANCE
from adapters.train.questions import Question
from adapters.train.sections import ModelSection, QuantizationSection
from adapters.upload import CONFIG as ADAPTER_CONFIG

BATCH = 8
NO_LIMIT = 1 << 20
"""Tokens of a row: an evaluation cuts nothing."""


def trial_of(path: Path, base: Path) -> Trial:
    """Of an adapter, or of a model that an adapter was merged into."""
    if (path / ADAPTER_CONFIG).is_file():
        return AdapterTrial(path, base)
    if (path / CONFIG).is_file():
        return MergedTrial(path, base)
    raise ConfigError(
        f"{path} holds no adapter and no model; expected a directory with {ADAPTER_CONFIG} (as save_pretrained writes "
        f"it) or {CONFIG} (as `loraplex merge` does)"
    )


class Trial(ABC):
    """A base, and what was made of it."""

    tokenizer: Any

    @abstractmethod
    def _asked(self, *, base: bool) -> tuple[Any, bool]:
        """A model, and whether its adapter is to be off."""

    def loss(self, conversations: Sequence[Conversation], *, base: bool) -> float:
        model, off = self._asked(base=base)
        examples: list[Example] = encode_all(conversations, self.tokenizer, NO_LIMIT)
        return held_out_loss(model, examples, self.tokenizer.pad_token_id, BATCH, base=off)

    def answers(
        self,
        asked: Sequence[Question],
        max_new_tokens: int,
        *,
        base: bool,
        told: Callable[[int], None] = lambda count: None,
    ) -> list[str]:
        model, off = self._asked(base=base)
        found: list[str] = []
        for start in range(0, len(asked), BATCH):
            chats = [question.chat for question in asked[start : start + BATCH]]
            found += replies(model, self.tokenizer, chats, max_new_tokens, base=off)
            told(len(chats))
        return found


class AdapterTrial(Trial):
    """One model, whose adapter can be switched off."""

    def __init__(self, adapter: Path, base: Path) -> None:
        from peft import PeftModel

        section, quantization = trained_on(adapter, base)
        self.tokenizer = models.load_tokenizer(section)
        self._model: Any = PeftModel.from_pretrained(models.load_base(section, quantization), str(adapter))

    def _asked(self, *, base: bool) -> tuple[Any, bool]:
        return self._model, base


class MergedTrial(Trial):
    """Two models, one in memory at a time."""

    def __init__(self, merged: Path, base: Path) -> None:
        self._merged, self._base, self._dtype = merged, base, computed_in(merged)
        self.tokenizer = models.load_tokenizer(ModelSection(model_name_or_path=merged))
        self._held: tuple[Path, Any] | None = None

    def _asked(self, *, base: bool) -> tuple[Any, bool]:
        path = self._base if base else self._merged
        if self._held is None or self._held[0] != path:
            self._held = None  # before the other is loaded
            section = ModelSection(model_name_or_path=path, dtype=self._dtype)
            self._held = path, models.load_base(section, QuantizationSection(load_in_4bit=False))
        return self._held[1], False


def computed_in(model: Path) -> Literal["auto", "float32"]:
    """What holds its values exactly: bfloat16 has fewer digits than the other two."""
    config = read_document(model / CONFIG)
    return "float32" if config.get("dtype", config.get("torch_dtype")) in ("float32", "float16") else "auto"


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
