"""Where a version is in its life, for a person to follow: what the registry says of it, and what the engine does.

    checking → ready → loading → resident → draining → gone        merged · quarantined · merge_only · failed

A registry state other than `ready` is the status as it is; a ready one is looked up among what the engine holds. Where
a merged engine answers, that is the status. It reads residency and turns at one moment and changes nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from adapters.records import MERGE_ONLY, READY, Version
from server.engine.merged import MergedEngine, MergedEngines
from server.fairness import Turns
from server.residency import Residency, Resident
from server.resolve import engine_name


@dataclass(frozen=True)
class Status:
    status: str
    resident: bool = False
    leases: int = 0
    """Requests that use it now."""
    waiting: int = 0
    """Requests that wait for their turn with it."""
    resident_since: float | None = None
    """Unix time."""
    load_s: float | None = None
    """How long its last load took."""
    merged: str | None = None
    """The state of its merged engine, where it has one."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Moment:
    """What the engine holds and does right now: read once for an answer about many versions."""

    def __init__(
        self,
        held: Mapping[str, Resident],
        loading: Collection[str] = (),
        waiting: Mapping[str | None, int] | None = None,
        merged: Mapping[str, MergedEngine] | None = None,
    ) -> None:
        """By engine name."""
        self._held = held
        self._loading = set(loading)
        self._waiting = waiting or {}
        self._merged = merged or {}

    @classmethod
    def now(cls, residency: Residency, turns: Turns, merged: MergedEngines) -> Moment:
        return cls(residency.snapshot(), residency.loading(), turns.waiting_by_line(), merged.snapshot())

    def resident_of(self, adapter: str) -> int:
        """How many of its versions the engine holds."""
        return sum(name.partition("@")[0] == adapter for name in self._held)

    def of(self, version: Version) -> Status:
        status = self._in_base(version)
        engine = self._merged.get(engine_name(version))
        if engine is None:
            return status
        serves = engine.state == "ready" and version.state in (READY, MERGE_ONLY)
        return replace(
            status,
            status="merged" if serves else status.status,
            merged=engine.state,
            leases=status.leases + engine.leases,
            waiting=status.waiting + engine.turns.waiting,
        )

    def _in_base(self, version: Version) -> Status:
        name = engine_name(version)
        held, waiting = self._held.get(name), self._waiting.get(name, 0)
        if held is None:
            loading = version.state == READY and name in self._loading
            return Status("loading" if loading else version.state, waiting=waiting)
        status = "resident" if version.state == READY and held.state == "resident" else version.state
        return Status(status, True, held.leases, waiting, round(held.since, 3), round(held.load_s, 4))
