"""What a loaded model says of the probes, and whether an export says what its source says. One model at a time.

Three things are heard: log-probabilities of texts, greedy answers, and what the tokenizer and the chat template make of
texts. Where an export cuts texts otherwise it computes something else however right its weights are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from adapters.errors import NotTheSame
from adapters.merge.export.parity import Parity, compare
from adapters.merge.export.reader import Reader
from adapters.merge.probes import gather
from adapters.tensor_values import Matrix
from adapters.train.formats import Message
from adapters.train.labels import IGNORED, Example

ANSWERS = 3
ANSWER_TOKENS = 24
TEXTS = (
    "The quick brown fox jumps over 1234 lazy dogs; isn't it? They've said: 3.14159!\n\n  Yes.\t\tNo",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. Ça va? Привет, мир! 你好，世界",
    "def f(x):\n    return x ** 2  # comment\n\n\n    print('HELLO world'.lower())\r\n",
    "🚀 (normal) 😶‍🌫️ a'LL we'RE ''quoted'' //path/to/File_Name.txt {\"key\": [1, 22, 333]}",
)

CHATS: tuple[tuple[Message, ...], ...] = (
    ({"role": "user", "content": "Why does bread rise?"},),
    (
        {"role": "user", "content": "What is 17 times 6?"},
        {"role": "assistant", "content": "102."},
        {"role": "user", "content": "  And 18 times 6?\n"},
    ),
)


@dataclass(frozen=True)
class Texts:
    examples: tuple[Example, ...]
    """Of which log-probabilities are heard."""
    chats: tuple[tuple[Message, ...], ...]
    """To be rendered; empty where there is no chat template."""
    source: str
    """Of the examples, for people."""


def gathered(source: Path, tokenizer: Any, tokens: int) -> Texts:
    """What an adapter held out of its training, else chats of this package; a third of it general text."""
    found = gather(source, tokenizer, max(1, tokens * 2 // 3))
    return Texts((*found.task, *found.general), CHATS if tokenizer.chat_template else (), found.source)


@dataclass(frozen=True)
class Heard:
    rows: Matrix
    """[tokens, vocabulary]"""
    came: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]
    texts: Mapping[str, tuple[int, ...]]
    """Ours, and the chats as they were rendered: between special tokens some tokenizers cut otherwise."""
    chats: tuple[str, ...]


@dataclass(frozen=True)
class Check:
    """Of an export, by the program that is meant to load it."""

    by: str
    probes: str
    parity: Parity
    same_answers: float
    """Share of the tokens of greedy answers before the first that differs."""
    other_texts: tuple[str, ...]
    """Those that become other tokens."""
    other_chats: int

    def record(self) -> Mapping[str, Any]:
        return {
            "by": self.by,
            "probes": self.probes,
            **self.parity.record(),
            "same_answers": self.same_answers,
            "texts_cut_otherwise": list(self.other_texts),
            "chats_rendered_otherwise": self.other_chats,
        }


def hear(reader: Reader, probes: Texts) -> Heard:
    parts = [(example, _places(example)) for example in probes.examples]
    asked = [example.ids[: places[0]] for example, places in parts[:ANSWERS]]
    chats = tuple(reader.rendered(chat) for chat in probes.chats)
    return Heard(
        rows=np.concatenate([reader.rows(example.ids, places) for example, places in parts]),
        came=tuple(example.ids[place] for example, places in parts for place in places),
        answers=tuple(tuple(reader.greedy(prompt, ANSWER_TOKENS)) for prompt in asked),
        texts={text: tuple(reader.tokens(text)) for text in (*TEXTS, *chats)},
        chats=chats,
    )


def judge(source: Heard, export: Heard, by: str, probes: str) -> Check:
    common = source.texts.keys() & export.texts.keys()
    return Check(
        by=by,
        probes=probes,
        parity=compare(source.rows, export.rows, source.came),
        same_answers=_same(source.answers, export.answers),
        other_texts=tuple(sorted(text for text in common if source.texts[text] != export.texts[text])),
        other_chats=sum(1 for theirs, own in zip(source.chats, export.chats, strict=True) if theirs != own),
    )


def require_same_reading(check: Check) -> None:
    """Whoever loads it reads a text, and a chat, as its source does. Raises NotTheSame."""
    if check.other_texts:
        raise NotTheSame(
            f"{check.by} cuts {len(check.other_texts)} texts into other tokens than the source's tokenizer, such as "
            f"{check.other_texts[0]!r:.120}; whoever knows why accepts it (accept_differences)",
            code="other_tokens",
        )
    if check.other_chats:
        raise NotTheSame(
            f"{check.by} renders {check.other_chats} chats otherwise than the source's chat template; whoever knows "
            "why accepts it (accept_differences)",
            code="other_template",
        )


def require_near(check: Check, max_kl: float | None) -> None:
    """Raises NotTheSame."""
    if max_kl is not None and not check.parity.kl <= max_kl:
        raise NotTheSame(
            f"in {check.by} the export is {check.parity.kl:.4f} nats per token (KL) from its source, allowed are "
            f"{max_kl:g}; take a type with more bits, allow more, or accept it (accept_loss)"
        )


def _places(example: Example) -> list[int]:
    return [place for place, label in enumerate(example.labels) if place and label != IGNORED]


def _same(source: Sequence[Sequence[int]], export: Sequence[Sequence[int]]) -> float:
    """Both may end: an end is a token like any other here."""
    equal = total = 0
    for theirs, own in zip(source, export, strict=True):
        length = max(len(theirs), len(own))
        differing = (place for place in range(length) if theirs[place : place + 1] != own[place : place + 1])
        equal += next(differing, length)
        total += length
    return equal / total if total else 1.0
