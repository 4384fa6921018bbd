"""What a list may be asked for, out of the query string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from fastapi import Query

from adapters.listing import Wanted
from adapters.tags import Condition, condition

PAGE = 1000
"""Rows in an answer, at most and by default."""
Limit = Annotated[int, Query(ge=1, le=PAGE)]
Word = Annotated[str | None, Query(max_length=256, pattern="^[^\\x00]*$")]
"""A database takes no NUL."""
Tags = Annotated[Sequence[str], Query(alias="tag", max_length=8)]
NONE: Sequence[str] = ()


def wanted(tag: Tags = NONE, name: Word = None, state: Word = None, kind: Word = None, base: Word = None) -> Wanted:
    """Of adapters: `name` may end in `*`; `tag` is `key=value` or `key`, and may be given again."""
    return Wanted(name, _conditions(tag), state, kind, base)


def wanted_versions(tag: Tags = NONE, state: Word = None) -> Wanted:
    return Wanted(tags=_conditions(tag), state=state)


def _conditions(tags: Sequence[str]) -> tuple[Condition, ...]:
    return tuple(condition(each) for each in tags)
