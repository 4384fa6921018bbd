"""Which versions of an adapter may go when only the newest are wanted, and why each of the others stays.

A pure judgement. Knows no database, no files and no engine; `adapters.holds` and the server tell what is held.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from adapters.records import CHECKING, DRAINING, FAILED, QUARANTINED, Adapter, Version

REASONS = {
    "recent": "one of the newest that are kept, or newer than one of them",
    "alias": "an alias points to it",
    "split": "an alias gives it a part of its traffic",
    "shadow": "it shadows an alias",
    "rollback": "the last move of an alias came from it, and could be taken back",
    "job": "a job that has not ended names it or its adapter",
    "leased": "requests use it, or wait for it",
    "state": "it is on its way in or out already",
}
"""Why a version stays; of several reasons the first."""
PASSING = {CHECKING, DRAINING}
"""States that somebody is about to change."""
USELESS = {QUARANTINED, FAILED, *PASSING}
"""What cannot serve does not count as one of the newest."""


@dataclass(frozen=True)
class Holds:
    """What keeps versions of one adapter beside its aliases."""

    shadows: frozenset[int] = frozenset()
    rollbacks: frozenset[int] = frozenset()
    named_by_jobs: frozenset[str] = frozenset()
    """Adapter names, `name@number` and digests."""


@dataclass(frozen=True)
class Judgement:
    version: Version
    reason: str | None = field(default=None)
    """A key of REASONS; None: it may go."""

    @property
    def goes(self) -> bool:
        return self.reason is None


def judge(
    adapter: Adapter, keep: int | None, holds: Holds, in_use: Callable[[Version], bool] = lambda _: False
) -> list[Judgement]:
    """Every version, oldest first. `keep`: how many of the newest that can serve stay; None: all of them.

    `in_use`: whether requests hold it.
    """
    oldest_kept = _oldest_kept(adapter, keep)

    def reason(version: Version) -> str | None:
        number = version.number
        pointing = [target for target in adapter.targets.values() if number in target]
        held = {
            "recent": oldest_kept is None or number >= oldest_kept,
            "alias": any(len(target) == 1 for target in pointing),
            "split": bool(pointing),
            "shadow": number in holds.shadows,
            "rollback": number in holds.rollbacks,
            "job": bool(holds.named_by_jobs & {adapter.name, version.ref, version.digest}),
            "leased": in_use(version),
            "state": version.state in PASSING,
        }
        return next((why for why in REASONS if held[why]), None)

    return [Judgement(version, reason(version)) for version in adapter.versions]


def _oldest_kept(adapter: Adapter, keep: int | None) -> int | None:
    """The number from which on all versions are recent; None: from the first."""
    usable = [version.number for version in adapter.versions if version.state not in USELESS]
    return None if keep is None or len(usable) < keep else usable[-keep]
