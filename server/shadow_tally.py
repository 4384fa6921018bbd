"""What an answer says, whether two answers are the same, and the sum of many comparisons. Pure.

It keeps no text: of an example that differs there remain the prompt's SHA-256, where the two part, and their lengths.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

EXAMPLES = 8


@dataclass(frozen=True)
class Said:
    """One answer: a text and a reason to finish for each choice."""

    texts: tuple[str, ...]
    finishes: tuple[str | None, ...]
    ttft_s: float | None
    total_s: float

    @property
    def length(self) -> int:
        return sum(map(len, self.texts))


def read_body(body: Mapping[str, Any], ttft_s: float | None, total_s: float) -> Said:
    """Of a whole answer."""
    choices = sorted(body["choices"], key=lambda choice: choice["index"])
    texts = [_text(choice.get("message") or choice) for choice in choices]
    return Said(tuple(texts), tuple(choice.get("finish_reason") for choice in choices), ttft_s, total_s)


def read_events(events: Iterable[str], ttft_s: float | None, total_s: float) -> Said | None:
    """Of a stream; None where it ended with an error or before its end."""
    parts: dict[int, dict[str, Any]] = {}
    done = False
    for event in events:
        data = event.removeprefix("data: ").strip()
        if data == "[DONE]":
            done = True
            continue
        chunk = json.loads(data)
        if "error" in chunk:
            return None
        for choice in chunk.get("choices", ()):
            part = parts.setdefault(choice["index"], {"text": "", "calls": {}, "finish": None})
            _add(part, choice)
    if not done or not parts:
        return None
    found = [parts[index] for index in sorted(parts)]
    texts = [part["text"] + "".join(part["calls"][index] for index in sorted(part["calls"])) for part in found]
    return Said(tuple(texts), tuple(part["finish"] for part in found), ttft_s, total_s)


def _add(part: dict[str, Any], choice: Mapping[str, Any]) -> None:
    delta = choice.get("delta") or choice
    part["text"] += delta.get("content") or delta.get("text") or ""
    for call in delta.get("tool_calls") or ():
        part["calls"][call["index"]] = part["calls"].get(call["index"], "") + _call(call)
    part["finish"] = choice.get("finish_reason") or part["finish"]


def _text(message: Mapping[str, Any]) -> str:
    calls = "".join(_call(call) for call in message.get("tool_calls") or ())
    return (message.get("content") or message.get("text") or "") + calls


def _call(call: Mapping[str, Any]) -> str:
    """Of a tool: what it is called with; its id is made up anew each time."""
    function = call.get("function") or {}
    return (function.get("name") or "") + (function.get("arguments") or "")


def first_difference(one: Said, other: Said) -> int | None:
    """The position of the first character that differs, of all choices in a row; None where the texts are the same."""
    if one.texts == other.texts:
        return None
    a, b = "\0".join(one.texts), "\0".join(other.texts)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def prompt_sha256(body: Mapping[str, Any]) -> str:
    """Of what was asked, as JSON with sorted keys: who has the request in a log can find it again."""
    asked = {key: body[key] for key in ("messages", "prompt") if key in body}
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


@dataclass
class Tally:
    """Of one shadow, since it was set or the server started."""

    number: int
    since: float = field(default_factory=time.time)
    compared: int = 0
    agreed: int = 0
    same_finish: int = 0
    lengths: list[int] = field(default_factory=lambda: [0, 0])
    """Characters of all answers that were compared: of the alias, of the shadow. So too the seconds."""
    total_s: list[float] = field(default_factory=lambda: [0.0, 0.0])
    ttft_s: list[float] = field(default_factory=lambda: [0.0, 0.0])
    errors: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    examples: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=EXAMPLES))

    def add(self, body: Mapping[str, Any], answered: Said, shadowed: Said) -> bool:
        """Whether the two agree: the same texts, finished for the same reasons."""
        agrees = (answered.texts, answered.finishes) == (shadowed.texts, shadowed.finishes)
        self.compared += 1
        self.agreed += agrees
        self.same_finish += answered.finishes == shadowed.finishes
        both = (answered, shadowed)
        self.lengths = [had + each.length for had, each in zip(self.lengths, both, strict=True)]
        self.total_s = [had + each.total_s for had, each in zip(self.total_s, both, strict=True)]
        if answered.ttft_s is not None and shadowed.ttft_s is not None:
            self.ttft_s = [self.ttft_s[0] + answered.ttft_s, self.ttft_s[1] + shadowed.ttft_s]
        if not agrees:
            self.examples.appendleft(_example(body, answered, shadowed))
        return agrees

    def to_json(self) -> dict[str, Any]:
        return {
            "compared": self.compared,
            "agreed": self.agreed,
            "agreement": _ratio([self.compared, self.agreed]),
            "same_finish": self.same_finish,
            "length_ratio": _ratio(self.lengths),
            "latency_ratio": _ratio(self.total_s),
            "ttft_ratio": _ratio(self.ttft_s),
            "errors": dict(self.errors),
            "dropped": dict(self.dropped),
            "since": int(self.since),
            "examples": list(self.examples),
        }


def _example(body: Mapping[str, Any], answered: Said, shadowed: Said) -> dict[str, Any]:
    return {
        "at": int(time.time()),
        "prompt_sha256": prompt_sha256(body),
        "first_difference": first_difference(answered, shadowed),
        "lengths": [answered.length, shadowed.length],
        "finish_reasons": [list(answered.finishes), list(shadowed.finishes)],
    }


def _ratio(both: list[int] | list[float]) -> float | None:
    """The second to the first."""
    return round(both[1] / both[0], 4) if both[0] else None
