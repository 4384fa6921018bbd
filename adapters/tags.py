"""Tags of an adapter or of one version: short words by which people and pipelines find it again.

It knows their spelling and bounds; `tag_rows.py` keeps them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from adapters.errors import InvalidAdapter
from adapters.refusals import refuse

Tags = Mapping[str, str]
Changes = Mapping[str, str | None]
"""None takes the key away."""

Condition = tuple[str, str | None]
"""A key and its value; None stands for any value."""

NO_TAGS: Tags = {}
KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
MAX_VALUE = 256
MOST_TAGS = 64


def require_tags(changes: Changes) -> None:
    """Raises InvalidAdapter for a key or a value that cannot be."""
    for key, value in changes.items():
        if not KEY.fullmatch(key):
            raise _bad(f"the key {key[:80]!r}, expected 1 to 64 letters, digits, '.', '_', '-', the first no sign")
        if value is not None and (len(value) > MAX_VALUE or not value.isprintable()):
            raise _bad(f"{key}={value[:80]!r}, expected at most {MAX_VALUE} printable characters on one line")


def condition(text: str) -> Condition:
    """`key=value`, or `key` for any value. Raises InvalidAdapter for what no tag can be."""
    key, equals, value = text.partition("=")
    require_tags({key: value})
    return key, value if equals else None


def changed(tags: Tags, changes: Changes) -> dict[str, str]:
    """All tags after the changes. Raises InvalidAdapter where that would be too many."""
    after = {key: value for key, value in {**tags, **changes}.items() if value is not None}
    if len(after) > MOST_TAGS:
        raise _bad(f"{len(after)} tags, at most {MOST_TAGS}; remove some first")
    return after


def _bad(got: str) -> InvalidAdapter:
    return refuse("bad_tags", f"got {got}")
