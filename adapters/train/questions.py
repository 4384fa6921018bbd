"""What a data file asks, and what it expects as an answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from adapters.errors import DataError
from adapters.train.data import Conversation
from adapters.train.formats import Message


@dataclass(frozen=True)
class Question:
    chat: tuple[Message, ...]
    expected: str


def questions(conversations: Sequence[Conversation]) -> list[Question]:
    """The last answer of each conversation, and what stands before it. DataError where nothing does."""
    found = []
    for conversation in conversations:
        messages = conversation.messages
        last = max((number for number, message in enumerate(messages) if message["role"] == "assistant"), default=0)
        if not last:
            raise DataError(f"{conversation.place}: no question and answer to compare; expected messages")
        asked = tuple({key: message[key] for key in ("role", "content")} for message in messages[:last])
        found.append(Question(asked, messages[last]["content"]))
    return found
