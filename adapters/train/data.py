"""Conversations, each with its place in a file, known by their content: copies, near copies, and a split by hash.

It knows nothing of files (reading.py) and of tokenizers (labels.py).
"""

from __future__ import annotations

import hashlib
import json
import math
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from adapters.errors import DataError
from adapters.train.formats import RAW_ROLES, Message


@dataclass(frozen=True)
class Conversation:
    messages: tuple[Message, ...]
    place: str
    """`file:line`, for error messages."""
    weight: float = 1.0
    """How often an epoch sees it."""

    @property
    def raw(self) -> bool:
        """A prompt and its completion, or a text: no chat template is put around it."""
        return self.messages[0]["role"] in RAW_ROLES

    @cached_property
    def digest(self) -> str:
        """Of the content only: the same conversation twice has one digest."""
        return hashlib.sha256(json.dumps(self.messages, sort_keys=True).encode()).hexdigest()

    @cached_property
    def gist(self) -> str:
        """Digest of the words alone: near copies, which differ in case, spaces or punctuation, have one gist."""
        words = unicodedata.normalize("NFKC", "\n".join(message["content"] for message in self.messages)).casefold()
        letters = "".join(character for character in words if character.isalnum())
        return hashlib.sha256((letters or words).encode()).hexdigest()


@dataclass(frozen=True)
class Split:
    train: tuple[Conversation, ...]
    held_out: tuple[Conversation, ...]
    copies: tuple[str, ...] = ()
    """`file:line is file:line again`, of conversations that occurred before; they were left out."""

    @property
    def duplicates(self) -> int:
        return len(self.copies)


def without_copies(conversations: Iterable[Conversation]) -> tuple[tuple[Conversation, ...], tuple[str, ...]]:
    """The first of each, and a line for every other."""
    first: dict[str, Conversation] = {}
    copies = []
    for conversation in conversations:
        original = first.setdefault(conversation.digest, conversation)
        if original is not conversation:
            copies.append(f"{conversation.place} is {original.place} again")
    return tuple(first.values()), tuple(copies)


def split_by_hash(conversations: Sequence[Conversation], share: float) -> Split:
    """Hold out the `share` with the lowest digests: stable under reordering, and no copy or near copy leaks across."""
    unique, copies = without_copies(conversations)
    ranked = sorted(unique, key=lambda conversation: conversation.digest)
    groups: dict[str, list[Conversation]] = {}
    for conversation in ranked:
        groups.setdefault(conversation.gist, []).append(conversation)
    if len(groups) < 2:
        raise DataError(f"{conversations[0].place}: 2 different conversations are needed to hold one out, got 1")
    wanted = max(1, math.ceil(share * len(ranked)))
    held_out: list[Conversation] = []
    for group in list(groups.values())[:-1]:
        if len(held_out) < wanted:
            held_out += group
    kept_back = {conversation.digest for conversation in held_out}
    train = tuple(conversation for conversation in ranked if conversation.digest not in kept_back)
    return Split(train, tuple(held_out), copies)


def digest_of(conversations: Iterable[Conversation]) -> str:
    """Identity of a data set: independent of the order of its rows and of its file names."""
    return hashlib.sha256("\n".join(sorted(c.digest for c in conversations)).encode()).hexdigest()
