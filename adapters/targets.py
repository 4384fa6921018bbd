"""Where an alias points: one version, or several that share its traffic by weight. Which one a request gets."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping

from adapters.errors import InvalidAdapter

Target = Mapping[int, int]
"""Version number → weight. One number: the alias just points to it. None at all: the alias is not there."""

MOST_VERSIONS = 8
MOST_WEIGHT = 1_000_000


def require_target(target: Target) -> None:
    """Raises InvalidAdapter for a split that means nothing."""
    if not 1 <= len(target) <= MOST_VERSIONS:
        raise _bad_split(f"it names {len(target)} versions, expected 1 to {MOST_VERSIONS}")
    for number, weight in target.items():
        if not 1 <= weight <= MOST_WEIGHT:
            raise _bad_split(
                f"version {number} has the weight {weight}, expected 1 to {MOST_WEIGHT:,}; leave it out for 0"
            )


def require_percent(percent: int) -> None:
    if not 1 <= percent <= 100:
        raise InvalidAdapter(
            f"the shadow gets {percent} of a hundred requests, expected 1 to 100; null takes the shadow away",
            code="bad_shadow",
        )


def main_version(target: Target) -> int:
    """The version with the most traffic, the older of equals: what the alias means where only one can be shown."""
    return min(target, key=lambda number: (-target[number], number))


def main_versions(targets: Mapping[str, Target]) -> dict[str, int]:
    """Alias → the version that has the most of its traffic."""
    return {alias: main_version(target) for alias, target in targets.items()}


def splits_of(targets: Mapping[str, Target]) -> dict[str, Target]:
    """Only the aliases that several versions share."""
    return {alias: target for alias, target in targets.items() if len(target) > 1}


def aliases_of(targets: Mapping[str, Target], number: int) -> list[str]:
    """Of alias → target, those aliases that point to this version, alone or among others."""
    return sorted(alias for alias, target in targets.items() if number in target)


def choose(target: Target, alias: str, sticky: str | None) -> int:
    """A version, in proportion to the weights. `alias`: name and alias; the same `sticky` (a user) gets the same one.

    A user keeps it when the weight of the highest number grows: a canary that is widened loses nobody.
    """
    if len(target) == 1:
        return next(iter(target))
    if sticky is None:
        position = secrets.randbelow(1 << 64)
    else:
        position = int.from_bytes(hashlib.sha256(f"{alias}\0{sticky}".encode(errors="replace")).digest()[:8])
    position = position * sum(target.values()) >> 64
    for number in sorted(target):
        position -= target[number]
        if position < 0:
            return number
    raise AssertionError("a position lies below the sum of the weights")


def to_json(target: Target) -> dict[str, int]:
    """Keys of JSON are strings."""
    return {str(number): target[number] for number in sorted(target)}


def from_json(data: Mapping[str, int]) -> dict[int, int]:
    return {int(number): weight for number, weight in data.items()}


def _bad_split(what: str) -> InvalidAdapter:
    return InvalidAdapter(f"the split cannot be: {what}", code="bad_split")
