"""Training data: JSONL files → conversations, each with its place, split by content.

A line is `{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}`. It knows
nothing of tokenizers; labels.py turns a conversation into tokens.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters.errors import DataError

ROLES = ("system", "user", "assistant")
Message = Mapping[str, str]


@dataclass(frozen=True)
class Conversation:
    messages: tuple[Message, ...]
    place: str
    """`file:line`, for error messages."""

    @property
    def digest(self) -> str:
        """Of the content only: the same conversation twice has one digest."""
        return hashlib.sha256(json.dumps(self.messages, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Split:
    train: tuple[Conversation, ...]
    held_out: tuple[Conversation, ...]
    duplicates: int
    """Conversations that occurred before; they were left out."""


def read_conversations(paths: Sequence[Path]) -> tuple[Conversation, ...]:
    found = tuple(conversation for path in paths for conversation in _read_file(path))
    if not found:
        raise DataError(f"{', '.join(map(str, paths))}: no conversation found; one JSON object a line is expected")
    return found


def split_by_hash(conversations: Sequence[Conversation], share: float) -> Split:
    """Hold out the `share` with the lowest digests: stable under reordering, and a copy can never leak across."""
    unique = {conversation.digest: conversation for conversation in conversations}
    if len(unique) < 2:
        raise DataError(f"{conversations[0].place}: 2 different conversations are needed to hold one out, got 1")
    ranked = [unique[digest] for digest in sorted(unique)]
    count = min(max(1, math.ceil(share * len(ranked))), len(ranked) - 1)
    return Split(tuple(ranked[count:]), tuple(ranked[:count]), len(conversations) - len(unique))


def digest_of(conversations: Sequence[Conversation]) -> str:
    """Identity of a data set: independent of the order of its rows and of its file names."""
    return hashlib.sha256("\n".join(sorted(c.digest for c in conversations)).encode()).hexdigest()


def _read_file(path: Path) -> Iterator[Conversation]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            place = f"{path}:{number}"
            yield Conversation(_read_line(line, place), place)


def _read_line(line: str, place: str) -> tuple[Message, ...]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: not valid JSON: {error}") from error
    if not isinstance(row, dict) or not isinstance(row.get("messages"), list):
        raise DataError(f'{place}:messages: expected {{"messages": [...]}}, got {line[:60]}')
    messages = tuple(_read_message(m, f"{place}:messages[{i}]") for i, m in enumerate(row["messages"]))
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError(f"{place}:messages: no message of the assistant, so there is nothing to learn")
    return messages


def _read_message(message: Any, field: str) -> Message:
    if not isinstance(message, dict):
        raise DataError(f"{field}: expected an object with role and content, got {message!r}")
    if unknown := set(message) - {"role", "content"}:
        raise DataError(f"{field}.{min(unknown)}: unknown key; expected role and content only")
    if message.get("role") not in ROLES:
        raise DataError(f"{field}.role: expected one of {', '.join(ROLES)}, got {message.get('role')!r}")
    content = message.get("content")
    if not isinstance(content, str) or not content.strip():
        raise DataError(f"{field}.content: expected text that is not empty, got {content!r}")
    return {"role": message["role"], "content": content}
