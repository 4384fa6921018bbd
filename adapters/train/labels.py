"""One conversation → token ids and labels, through the chat template that serving will use.

Only the assistant's words are trained, each turn including the end-of-turn token, so that the model learns to stop.
Spans come from rendering the conversation turn by turn, never from looking for token ids: where pad equals eos (as
here) a mask by id hides every end of turn, and most templates cannot mark the assistant's words themselves.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from adapters.errors import DataError
from adapters.train.data import Conversation

IGNORED = -100
"""The label of a token that is read but not learnt; torch's cross-entropy skips it."""


@dataclass(frozen=True)
class Example:
    ids: tuple[int, ...]
    labels: tuple[int, ...]
    truncated: bool

    @property
    def trained_tokens(self) -> int:
        return sum(label != IGNORED for label in self.labels)


def encode_all(conversations: Sequence[Conversation], tokenizer: Any, max_length: int) -> list[Example]:
    return [encode(conversation, tokenizer, max_length) for conversation in conversations]


def encode(conversation: Conversation, tokenizer: Any, max_length: int) -> Example:
    """Segments are tokenised one by one: at serving the prompt is also tokenised without the answer behind it."""
    ids: list[int] = []
    labels: list[int] = []
    for text, trained in _segments(conversation, tokenizer):
        segment = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += segment
        labels += segment if trained else [IGNORED] * len(segment)
    example = Example(tuple(ids[:max_length]), tuple(labels[:max_length]), len(ids) > max_length)
    if not example.trained_tokens:
        raise DataError(
            f"{conversation.place}: no token to train within data.max_length={max_length}; the conversation has "
            f"{len(ids)} tokens, raise max_length or shorten it"
        )
    return example


def chat_template_sha256(tokenizer: Any) -> str:
    return hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()


def _segments(conversation: Conversation, tokenizer: Any) -> Iterator[tuple[str, bool]]:
    """Cut the rendered conversation into (text, is it trained), in order and without a gap."""
    whole, done = _render(conversation, tokenizer, len(conversation.messages)), 0
    for turn, message in enumerate(conversation.messages):
        if message["role"] != "assistant":
            continue
        start = _prefix_length(conversation, tokenizer, whole, turn, generation_prompt=True)
        stop = _prefix_length(conversation, tokenizer, whole, turn + 1, generation_prompt=False)
        end = whole.rfind(tokenizer.eos_token, start, stop)
        if end < 0:
            raise DataError(
                f"{conversation.place}: the chat template does not close the assistant's turn with the end token "
                f"{tokenizer.eos_token!r}, so the model would never learn to stop; use a template that does"
            )
        end += len(tokenizer.eos_token)
        yield whole[done:start], False
        yield whole[start:end], True
        done = end
    yield whole[done:], False


def _prefix_length(
    conversation: Conversation, tokenizer: Any, whole: str, turns: int, *, generation_prompt: bool
) -> int:
    prefix = _render(conversation, tokenizer, turns, generation_prompt=generation_prompt)
    if not whole.startswith(prefix):
        raise DataError(
            f"{conversation.place}:messages[{turns}]: the chat template renders the first {turns} messages "
            "differently when more follow, so what is trained is not what is served; end the conversation there"
        )
    return len(prefix)


def _render(conversation: Conversation, tokenizer: Any, turns: int, *, generation_prompt: bool = False) -> str:
    messages = list(conversation.messages[:turns])
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation_prompt))
