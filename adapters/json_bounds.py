"""How deep and how long strangers' JSON is, counted before it is parsed: a few megabytes of `[],` become gigabytes of
objects, and a value that is nested too deep to be shown again is an error wherever that is tried.
"""

from __future__ import annotations

import re

MAX_DEPTH = 64
STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
"""Also one without an end: looking for the next beginning then would take quadratic time."""
SQUARE = bytes.maketrans(b"{}", b"[]")
NOT_BRACKETS = bytes(sorted(set(range(256)) - set(b"[]{}")))


def values_of(raw: bytes) -> int:
    """At most so many values are in it; commas in strings count too."""
    return 1 + sum(raw.count(mark) for mark in (b",", b"[", b"{")) + raw.count(b'"') // 4


def require_bounded(raw: bytes, max_values: int) -> None:
    """Raises ValueError. What is no JSON at all may pass."""
    if (values := values_of(raw)) > max_values:
        raise ValueError(f"it holds up to {values} values, at most {max_values} are read")
    brackets = STRING.sub(b"", raw).translate(SQUARE, NOT_BRACKETS)
    for _ in range(MAX_DEPTH):
        brackets = brackets.replace(b"[]", b"")
    if brackets:
        raise ValueError(f"it is nested more than {MAX_DEPTH} deep, or its brackets do not match")
