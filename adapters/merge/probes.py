"""The texts that a merge is measured on: given ones, else what the adapter held out of its training, else our own.

Beside those of the task there is always a general set, on which nothing should change for the worse.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adapters.train.data import Conversation, without_copies
from adapters.train.formats import Message
from adapters.train.labels import IGNORED, Example, encode_all
from adapters.train.reading import read_files
from adapters.train.sections import DataFile
from adapters.upload import HELD_OUT

TEXTS = Path(__file__).parent / "texts"
CHATS, PROSE = TEXTS / "chats.jsonl", TEXTS / "prose.jsonl"
MAX_LENGTH = 512
"""Tokens of a row; what is longer is cut at its end, a text into pieces."""


@dataclass(frozen=True)
class Probes:
    task: tuple[Example, ...]
    general: tuple[Example, ...]
    source: str
    """Of the task's texts, for people."""

    @property
    def tokens(self) -> int:
        """That are predicted."""
        return self.task_tokens + self.general_tokens

    @property
    def task_tokens(self) -> int:
        return _measured(self.task)

    @property
    def general_tokens(self) -> int:
        return _measured(self.general)


def gather(
    adapter: Path, tokenizer: Any, tokens: int, data: Sequence[Path] = (), general: Path | None = None
) -> Probes:
    """At most `tokens` predicted tokens of the task and half as many of general text. Raises DataError."""
    source, rows = _task(adapter, tokenizer, data)
    return Probes(
        task=_bounded(rows, tokenizer, tokens),
        general=_bounded(_read([general or PROSE]), tokenizer, max(1, tokens // 2)),
        source=source,
    )


def _task(adapter: Path, tokenizer: Any, data: Sequence[Path]) -> tuple[str, Sequence[Conversation]]:
    if data:
        return ", ".join(path.name for path in data), _read(data)
    if (adapter / HELD_OUT).is_file():
        return "held out of its training", _read([adapter / HELD_OUT])
    chats = _read([CHATS])
    if tokenizer.chat_template:
        return "the chats of this package", chats
    return "the chats of this package, as plain text", [_plain(chat) for chat in chats]


def _read(files: Sequence[Path]) -> Sequence[Conversation]:
    """By digest: the first of them are a fair sample, whatever a file is sorted by."""
    reading = read_files([DataFile(path=path) for path in files])
    return sorted(without_copies(reading.conversations)[0], key=lambda row: row.digest)


def _plain(chat: Conversation) -> Conversation:
    *asked, answer = chat.messages
    prompt = "\n\n".join(message["content"] for message in asked)
    messages: tuple[Message, ...] = (
        {"role": "prompt", "content": f"{prompt}\n\n"},
        {"role": "completion", "content": answer["content"]},
    )
    return replace(chat, messages=messages)


def _bounded(rows: Sequence[Conversation], tokenizer: Any, tokens: int) -> tuple[Example, ...]:
    found: list[Example] = []
    for row in rows:
        for example in encode_all([row], tokenizer, MAX_LENGTH):
            if example.trained_tokens and tokens:
                found.append(_first(example, tokens))
                tokens -= found[-1].trained_tokens
    return tuple(found)


def _first(example: Example, count: int) -> Example:
    """Only so many of its trained tokens, and nothing behind them."""
    trained = [place for place, label in enumerate(example.labels) if label != IGNORED]
    end = trained[min(count, len(trained)) - 1] + 1
    return replace(example, ids=example.ids[:end], labels=example.labels[:end])


def _measured(examples: Sequence[Example]) -> int:
    return sum(example.trained_tokens for example in examples)
