"""One conversation → token ids and labels, through the chat template that serving will use.

Of a conversation the assistant's words are trained, each turn including the end-of-turn token, so that the model learns
to stop. Spans come from rendering the conversation turn by turn, never from looking for token ids: where pad equals eos
(as here) a mask by id hides every end of turn, and most templates cannot mark the assistant's words themselves.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from jinja2.exceptions import TemplateError

from adapters.errors import DataError
from adapters.train.data import Conversation

IGNORED = -100
"""The label of a token that is read but not learnt; torch's cross-entropy skips it."""

TrainOn = Literal["assistant", "last", "all"]


@dataclass(frozen=True)
class Example:
    ids: tuple[int, ...]
    labels: tuple[int, ...]
    truncated: bool
    place: str = ""
    """`file:line` of what it was made of."""
    whole: int = 0
    """Tokens before it was cut."""
    ends: tuple[int, ...] = ()
    """Where a trained token ends a turn or a text."""
    weight: float = 1.0
    """How often an epoch sees it."""
    parts: tuple[int, ...] = ()
    """Lengths of the examples that were packed into it; empty where it is one."""

    @property
    def trained_tokens(self) -> int:
        return sum(label != IGNORED for label in self.labels)


@dataclass(frozen=True)
class Segment:
    ids: Sequence[int]
    trained: bool
    closes: bool = False
    """Its last token ends a turn, or the text."""


def encode_all(
    conversations: Sequence[Conversation], tokenizer: Any, max_length: int, train_on: TrainOn = "assistant"
) -> list[Example]:
    """An example a conversation; a text longer than `max_length` becomes several."""
    found: list[Example] = []
    for conversation in conversations:
        example = _whole(conversation, tokenizer, train_on)
        text = conversation.messages[0]["role"] == "text"
        starts = range(0, len(example.ids), max_length) if text else (0,)
        found += (_part(example, start, max_length, cut=not text) for start in starts)
    return found


def encode(conversation: Conversation, tokenizer: Any, max_length: int, train_on: TrainOn = "assistant") -> Example:
    """Cut at its end where it is longer than `max_length`."""
    return _part(_whole(conversation, tokenizer, train_on), 0, max_length, cut=True)


def chat_template_sha256(tokenizer: Any) -> str | None:
    """None where the base has no template."""
    template = tokenizer.chat_template
    return hashlib.sha256(str(template).encode()).hexdigest() if template else None


def end_tokens(tokenizer: Any) -> tuple[str, ...]:
    """What serving stops at: the tokenizer's eos, and what the base's generation_config.json names beside it.

    Llama 3 ends a turn with <|eot_id|> and Gemma with <end_of_turn>, neither of which is their tokenizer's eos.
    """
    others = _generation_ends(str(getattr(tokenizer, "name_or_path", "")))
    return tuple(dict.fromkeys((tokenizer.eos_token, *(tokenizer.convert_ids_to_tokens(other) for other in others))))


@cache
def _generation_ends(base: str) -> tuple[int, ...]:
    path = Path(base) / "generation_config.json"
    if not base or not path.is_file():
        return ()
    found = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    return tuple(found) if isinstance(found, list) else () if found is None else (found,)


def _whole(conversation: Conversation, tokenizer: Any, train_on: TrainOn) -> Example:
    """Segments are tokenised one by one: at serving the prompt is also tokenised without the answer behind it."""
    ids: list[int] = []
    labels: list[int] = []
    ends: list[int] = []
    cut = _raw_segments if conversation.raw else _chat_segments
    for segment in cut(conversation, tokenizer, train_on):
        ids += segment.ids
        labels += segment.ids if segment.trained else [IGNORED] * len(segment.ids)
        if segment.trained and segment.closes:
            ends.append(len(ids) - 1)
    bos = tokenizer.bos_token_id
    if bos is not None and bos != tokenizer.eos_token_id and ids[:2] == [bos, bos]:
        raise DataError(
            f"{conversation.place}: begins with {tokenizer.bos_token!r} twice: the tokenizer or its template "
            "puts one there, take the other out of the data"
        )
    return Example(tuple(ids), tuple(labels), False, conversation.place, len(ids), tuple(ends), conversation.weight)


def _part(example: Example, start: int, length: int, *, cut: bool) -> Example:
    """The first token has nothing before it to be predicted from: it is not trained."""
    stop = start + length
    return replace(
        example,
        ids=example.ids[start:stop],
        labels=(IGNORED, *example.labels[start + 1 : stop]),
        truncated=cut and example.whole > length,
        whole=example.whole if cut else min(length, example.whole - start),
        ends=tuple(end - start for end in example.ends if start <= end < stop),
    )


def _raw_segments(conversation: Conversation, tokenizer: Any, train_on: TrainOn) -> Iterator[Segment]:
    """No template; special tokens in front as /v1/completions puts them, the end token behind."""
    first, *rest = conversation.messages
    opening = tokenizer(first["content"])["input_ids"]
    if opening[-1:] == [tokenizer.eos_token_id]:
        opening = opening[:-1]  # some tokenizers end every text themselves
    text = not rest
    yield Segment(opening, trained=text or train_on == "all")
    for message in rest:
        yield Segment(tokenizer(message["content"], add_special_tokens=False)["input_ids"], trained=True)
    yield Segment([tokenizer.eos_token_id], trained=True, closes=True)


def _chat_segments(conversation: Conversation, tokenizer: Any, train_on: TrainOn) -> Iterator[Segment]:
    """Cut the rendered conversation, in order and without a gap."""

    def segment(text: str, *, trained: bool, closes: bool = False) -> Segment:
        return Segment(tokenizer(text, add_special_tokens=False)["input_ids"], trained, closes)

    if not tokenizer.chat_template:
        raise DataError(
            f"{conversation.place}: the base has no chat template, so it can only learn prompt-completion and text"
        )
    whole, done = _render(conversation, tokenizer, len(conversation.messages)), 0
    ends = end_tokens(tokenizer)
    turns = [number for number, message in enumerate(conversation.messages) if message["role"] == "assistant"]
    for turn in turns:
        learnt = conversation.messages[turn].get("weight", 1) and (train_on != "last" or turn == turns[-1])
        start = _prefix_length(conversation, tokenizer, whole, turn, generation_prompt=True)
        stop = _prefix_length(conversation, tokenizer, whole, turn + 1, generation_prompt=False)
        closed = [found + len(end) for end in ends if (found := whole.rfind(end, start, stop)) >= 0]
        if not closed:
            raise DataError(
                f"{conversation.place}: the chat template does not close the assistant's turn with an end token "
                f"({', '.join(ends)}), so the model would never learn to stop; use a template that does"
            )
        end = max(closed)
        yield segment(whole[done:start], trained=train_on == "all")
        yield segment(whole[start:end], trained=bool(learnt), closes=True)
        done = end
    yield segment(whole[done:], trained=train_on == "all")


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
    messages = [{"role": m["role"], "content": m["content"]} for m in conversation.messages[:turns]]
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation_prompt))
    except TemplateError as error:
        raise DataError(f"{conversation.place}: the base's chat template refuses this conversation: {error}") from error
