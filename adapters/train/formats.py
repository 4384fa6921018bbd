"""A row of a data file → messages. Five formats, told apart by their keys; another row is told which is nearest.

What chat will ask for becomes user and assistant messages, rendered by the chat template later. `prompt-completion` of
plain strings and `text` have roles of their own (RAW_ROLES) and never see a template: /v1/completions asks for them.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from reprlib import Repr
from typing import Any

from adapters.errors import DataError

Message = Mapping[str, Any]
Row = Mapping[str, Any]

ROLES = ("system", "user", "assistant")
RAW_ROLES = ("prompt", "completion", "text")
ANSWERS = ("assistant", "completion", "text")
KEYS, KEY_LENGTH = 20, 40
"""What an error shows of a row's keys."""
PREFERENCES = ("chosen", "rejected")
SPEAKERS = {
    "system": "system",
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model", "bing", "bard"), "assistant"),
}


_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = 60


@dataclass(frozen=True)
class Format:
    name: str
    keys: tuple[str, ...]
    """A row has all of them; others are free."""
    example: str
    messages: Callable[[Row, str, bool], Iterator[Message]]
    """From a row, its `file:line`, and whether an answer may be empty."""


def recognise(row: Any, place: str) -> Format:
    """The format whose keys a row has; DataError names the nearest when it has none's."""
    if not isinstance(row, dict):
        raise DataError(f"{place}: expected an object, as {FORMATS['messages'].example}, got {shown(row)}")
    found = next((shape for shape in FORMATS.values() if set(shape.keys) <= set(row)), None)
    if found is not None:
        return found
    if set(PREFERENCES) & set(row):
        raise DataError(f"{place}: preference pairs ({', '.join(PREFERENCES)}) are not trained here; {_expected(row)}")
    raise DataError(f"{place}: got {_keys(row)}, which no format has; {_expected(row)}")


def read_row(row: Any, shape: Format, place: str, *, empty_answers: bool = False) -> tuple[Message, ...]:
    """Raises DataError that begins with file:line:field."""
    if not isinstance(row, dict):
        raise DataError(f"{place}: expected an object, as {shape.example}, got {shown(row)}")
    if missing := [key for key in shape.keys if key not in row]:
        other = next((f"; this is the format {f.name}" for f in FORMATS.values() if set(f.keys) <= set(row)), "")
        raise DataError(
            f"{place}:{missing[0]}: expected the format {shape.name}, as {shape.example}, got {_keys(row)}{other}"
        )
    messages = tuple(shape.messages(row, place, empty_answers))
    if not any(message["role"] in ANSWERS for message in messages):
        raise DataError(f"{place}:{shape.keys[0]}: no message of the assistant, so there is nothing to learn")
    return messages


def shown(value: Any) -> str:
    """Short, however large or deep the value is: a row may be anything."""
    return _SHORT.repr(value)


def _keys(row: Row) -> str:
    more = ", …" if len(row) > KEYS else ""
    return f"the keys {', '.join(sorted(_names(row)))}{more}" if row else "an object without keys"


def _names(row: Row) -> list[str]:
    return [str(key)[:KEY_LENGTH] for key in islice(row, KEYS)]


def _expected(row: Row) -> str:
    def likeness(shape: Format) -> float:
        return sum(
            max((difflib.SequenceMatcher(None, key, other.lower()).ratio() for other in _names(row)), default=0.0)
            for key in shape.keys
        ) / len(shape.keys)

    nearest = max(FORMATS.values(), key=likeness)
    return f"the nearest is {nearest.name}: {nearest.example}"


def _chat(row: Row, place: str, empty_answers: bool) -> Iterator[Message]:
    yield from _talk(row["messages"], f"{place}:messages", empty_answers)


def _talk(turns: Any, field: str, empty_answers: bool) -> Iterator[Message]:
    if not isinstance(turns, list):
        raise DataError(f"{field}: expected a list of messages, got {shown(turns)}")
    for number, turn in enumerate(turns):
        yield _message(turn, f"{field}[{number}]", empty_answers)


def _message(turn: Any, field: str, empty_answers: bool) -> Message:
    if not isinstance(turn, dict):
        raise DataError(f"{field}: expected an object with role and content, got {shown(turn)}")
    if turn.get("role") not in ROLES:
        raise DataError(f"{field}.role: expected one of {', '.join(ROLES)}, got {shown(turn.get('role'))}")
    role = turn["role"]
    allowed = {"role", "content", "weight"} if role == "assistant" else {"role", "content"}
    if unknown := set(turn) - allowed:
        raise DataError(f"{field}.{min(unknown)[:KEY_LENGTH]}: unknown key; expected {', '.join(sorted(allowed))} only")
    message = {"role": role, "content": _text(turn, "content", field, empty_answers if role == "assistant" else None)}
    if turn.get("weight", 1) not in (0, 1):
        raise DataError(
            f"{field}.weight: expected 1, or 0 for an answer that is read but not learnt, got {shown(turn)}"
        )
    return message if turn.get("weight", 1) else message | {"weight": 0}


def _sharegpt(row: Row, place: str, empty_answers: bool) -> Iterator[Message]:
    turns = row["conversations"]
    if not isinstance(turns, list):
        raise DataError(f"{place}:conversations: expected a list of turns, got {shown(turns)}")
    if row.get("system"):
        yield {"role": "system", "content": _text(row, "system", place)}
    for number, turn in enumerate(turns):
        field = f"{place}:conversations[{number}]"
        if not isinstance(turn, dict):
            raise DataError(f"{field}: expected an object with from and value, got {shown(turn)}")
        if "role" in turn:
            yield _message(turn, field, empty_answers)
            continue
        role = SPEAKERS.get(str(turn.get("from")))
        if role is None:
            raise DataError(f"{field}.from: expected one of {', '.join(SPEAKERS)}, got {shown(turn.get('from'))}")
        yield {"role": role, "content": _text(turn, "value", field, empty_answers if role == "assistant" else None)}


def _alpaca(row: Row, place: str, empty_answers: bool) -> Iterator[Message]:
    if row.get("system"):
        yield {"role": "system", "content": _text(row, "system", place)}
    history = row.get("history") or []
    if not isinstance(history, list):
        raise DataError(f"{place}:history: expected a list of [question, answer], got {shown(history)}")
    for number, pair in enumerate(history):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) and text for text in pair):
            raise DataError(f"{place}:history[{number}]: expected [question, answer], got {shown(pair)}")
        yield {"role": "user", "content": pair[0]}
        yield {"role": "assistant", "content": pair[1]}
    asked = _text(row, "instruction", place)
    if row.get("input"):
        asked += "\n\n" + _text(row, "input", place)
    yield {"role": "user", "content": asked}
    yield {"role": "assistant", "content": _text(row, "output", place, empty_answers)}


def _prompt_completion(row: Row, place: str, empty_answers: bool) -> Iterator[Message]:
    if isinstance(row["prompt"], list):
        yield from _talk(row["prompt"], f"{place}:prompt", empty_answers)
        yield from _talk(row["completion"], f"{place}:completion", empty_answers)
        return
    yield {"role": "prompt", "content": _text(row, "prompt", place)}
    yield {"role": "completion", "content": _text(row, "completion", place, empty_answers)}


def _document(row: Row, place: str, empty_answers: bool) -> Iterator[Message]:
    yield {"role": "text", "content": _text(row, "text", place)}


def _text(holder: Row, key: str, field: str, empty_answer: bool | None = None) -> str:
    """`empty_answer`: whether it may be empty where it is an answer; None where it is something else."""
    value, separator = holder.get(key), "." if "[" in field else ":"
    if not isinstance(value, str) or not (value.strip() or empty_answer):
        allow = "; data.gates.empty_answers=allow takes it" if isinstance(value, str) and empty_answer is False else ""
        raise DataError(f"{field}{separator}{key}: expected text that is not empty, got {shown(value)}{allow}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{field}{separator}{key}: half a character ({error.reason}) at {error.start}") from None
    return value


FORMATS: Mapping[str, Format] = {
    shape.name: shape
    for shape in (
        Format("messages", ("messages",), '{"messages": [{"role": "user", "content": "…"}, …]}', _chat),
        Format("sharegpt", ("conversations",), '{"conversations": [{"from": "human", "value": "…"}, …]}', _sharegpt),
        Format("alpaca", ("instruction", "output"), '{"instruction": "…", "input": "…", "output": "…"}', _alpaca),
        Format("prompt-completion", ("prompt", "completion"), '{"prompt": "…", "completion": "…"}', _prompt_completion),
        Format("text", ("text",), '{"text": "…"}', _document),
    )
}
