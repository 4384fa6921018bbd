"""What adapters, aliases and references may be called. Knows spelling only, not what is registered."""

from __future__ import annotations

import re

from adapters.errors import InvalidAdapter

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
NUMBER = re.compile(r"[0-9]{1,9}")
DIGEST_PREFIX = re.compile(r"sha256:([0-9a-f]{12,64})")
UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff]")
MAX_DESCRIPTION = 4000
DEFAULT = "default"
LATEST = "latest"


def require_name(name: str) -> None:
    if not NAME.fullmatch(name):
        raise _bad_name("adapter name", name)


def require_alias(alias: str) -> None:
    """An alias must not read as another kind of reference."""
    if not NAME.fullmatch(alias):
        raise _bad_name("alias", alias)
    if not is_alias(alias):
        raise InvalidAdapter(
            f"alias {alias!r} is reserved: digits, {LATEST!r} and sha256… already name versions; choose another",
            code="bad_name",
        )


def is_alias(ref: str) -> bool:
    """Whether a reference reads as an alias, not as a number, a digest or the newest."""
    return NAME.fullmatch(ref) is not None and not (ref == LATEST or ref.isdigit() or ref.startswith("sha256"))


def require_description(description: str | None) -> None:
    if description is None:
        return
    if len(description) > MAX_DESCRIPTION or UNPRINTABLE.search(description):
        raise InvalidAdapter(
            f"the description has {len(description)} characters, some perhaps unprintable; "
            f"use at most {MAX_DESCRIPTION} printable ones",
            code="bad_description",
        )


def _bad_name(what: str, got: str) -> InvalidAdapter:
    return InvalidAdapter(
        f"{what} {got[:140]!r} is not allowed; use 1 to 128 letters, digits, '.', '_' and '-', "
        "beginning with a letter or digit",
        code="bad_name",
    )
