"""The story of every engine of merged weights, in the registry's database: why it was built, what came of it, when.

    building → measuring → serving → demoted      or refused, failed, cancelled, rolled_back
    advised → withdrawn                           nothing was built

Each server tells of its own engines. Who decides is not known here, nor what the figures mean.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, RowMapping, delete, func, insert, select, update

from adapters import schema
from adapters.database import Database
from adapters.errors import NotFound

BUILDING, MEASURING, SERVING, ADVISED = "building", "measuring", "serving", "advised"
LIVE = (BUILDING, MEASURING, SERVING, ADVISED)
DEMOTED, REFUSED, FAILED, CANCELLED, ROLLED_BACK = "demoted", "refused", "failed", "cancelled", "rolled_back"
WITHDRAWN = "withdrawn"
UNHAPPY = (REFUSED, FAILED, CANCELLED, ROLLED_BACK)
"""After which a version rests."""
ENDED = (DEMOTED, WITHDRAWN, *UNHAPPY)
BY_POLICY, BY_HAND = "policy", "hand"
KEPT = 1000
"""Stories that have ended, of all servers; older ones are forgotten."""
EVENTS_KEPT = 50
"""Of a story; the first stays, the oldest of the others go."""

_table = schema.promotions


@dataclass(frozen=True)
class Promotion:
    id: str
    """`promo-` and hex digits; a later one's is greater."""
    server: str
    """Whose engine it is; 12 hex digits that lie in its data directory."""
    adapter: str
    number: int
    """Of the version, which may be gone by now."""
    state: str
    origin: str
    """`policy` or `hand`."""
    reason: str
    """Why it is in this state, in a sentence with figures."""
    job: str | None
    """The last job that built it."""
    figures: Mapping[str, Any]
    """What was known when it was decided, and what was measured since."""
    events: tuple[Mapping[str, Any], ...]
    """`at` (Unix time), `message` and perhaps `data`; the oldest first."""
    created_at: datetime
    switched_at: datetime | None
    """When requests first went there."""
    ended_at: datetime | None

    @property
    def ref(self) -> str:
        return f"{self.adapter}@{self.number}"

    @property
    def has_ended(self) -> bool:
        return self.state in ENDED


class Promotions:
    """Safe to share between threads; several servers may open the same database."""

    def __init__(self, database: Database, server: str) -> None:
        self._database = database
        self.server = server

    def begin(
        self,
        adapter: str,
        number: int,
        state: str,
        reason: str,
        *,
        origin: str = BY_POLICY,
        job: str | None = None,
        figures: Mapping[str, Any] | None = None,
        at: float | None = None,
    ) -> Promotion:
        at = time.time() if at is None else at
        promotion_id = f"promo-{time.time_ns() // 1_000_000:011x}{secrets.token_hex(5)}"
        values = {
            "server": self.server,
            "adapter": adapter,
            "number": number,
            "state": state,
            "origin": origin,
            "reason": reason,
            "job": job,
            "figures": dict(figures or {}),
            "events": [_event(at, reason)],
            "created_at": _time(at),
            "switched_at": _time(at) if state in (MEASURING, SERVING) else None,
        }
        with self._database.write() as connection:
            connection.execute(insert(_table).values(id=promotion_id, **values))
            return _read(connection, promotion_id)

    def change(
        self,
        promotion_id: str,
        reason: str,
        *,
        state: str | None = None,
        job: str | None = None,
        figures: Mapping[str, Any] | None = None,
        at: float | None = None,
    ) -> Promotion:
        """What happened next: an event, and the reason of the state that it is in from now on. Figures are added."""
        at = time.time() if at is None else at
        with self._database.write() as connection:
            before = _read(connection, promotion_id)
            state = state or before.state
            events = [*before.events, _event(at, reason)]
            values: dict[str, Any] = {
                "state": state,
                "reason": reason,
                "events": [events[0], *events[1:][1 - EVENTS_KEPT :]],
                "figures": {**before.figures, **(figures or {})},
            }
            if job is not None:
                values["job"] = job
            if state in (MEASURING, SERVING) and before.switched_at is None:
                values["switched_at"] = _time(at)
            if state in ENDED:
                values["ended_at"] = _time(at)
            connection.execute(update(_table).where(_table.c.id == promotion_id).values(**values))
            if state in ENDED:
                _forget_old(connection)
            return _read(connection, promotion_id)

    def abandon(self, server: str, why: str) -> None:
        """End the stories of a server that does not come back."""
        with self._database.read() as connection:
            live = select(_table.c.id, _table.c.state).where(_table.c.server == server, _table.c.state.in_(LIVE))
            found = connection.execute(live).all()
        for story in found:
            self.change(story.id, why, state=WITHDRAWN if story.state == ADVISED else DEMOTED)

    def promotion(self, promotion_id: str) -> Promotion:
        with self._database.read() as connection:
            return _read(connection, promotion_id)

    def promotions(
        self,
        *,
        after: str = "",
        limit: int | None = None,
        state: str | None = None,
        adapter: str | None = None,
        ended: bool | None = None,
    ) -> list[Promotion]:
        """Of all servers, the newest first, those older than `after`."""
        query = select(_table).order_by(_table.c.id.desc()).limit(limit)
        query = query.where(_table.c.id < after) if after else query
        query = query.where(_table.c.state == state) if state else query
        query = query.where(_table.c.adapter == adapter) if adapter else query
        query = query if ended is None else query.where(_table.c.state.in_(ENDED if ended else LIVE))
        with self._database.read() as connection:
            return [_promotion(row) for row in connection.execute(query).mappings()]

    def mine(self, states: tuple[str, ...] = LIVE) -> list[Promotion]:
        """This server's, the oldest first."""
        here = (_table.c.server == self.server, _table.c.state.in_(states))
        with self._database.read() as connection:
            found = connection.execute(select(_table).where(*here).order_by(_table.c.id)).mappings()
            return [_promotion(row) for row in found]


def _event(at: float, message: str) -> dict[str, Any]:
    return {"at": round(at, 3), "message": message}


def _time(at: float) -> datetime:
    return datetime.fromtimestamp(at, UTC)


def _read(connection: Connection, promotion_id: str) -> Promotion:
    spelled = promotion_id.isascii() and promotion_id.isprintable()  # else the database driver itself may choke on it
    query = select(_table).where(_table.c.id == promotion_id)
    row = connection.execute(query).mappings().one_or_none() if spelled else None
    if row is None:
        raise NotFound(f"there is no promotion {promotion_id[:80]!r}; the last {KEPT} that ended are kept")
    return _promotion(row)


def _promotion(row: RowMapping) -> Promotion:
    return Promotion(**{**row, "events": tuple(row["events"])})


def _forget_old(connection: Connection) -> None:
    ended = select(_table.c.id).where(_table.c.state.in_(ENDED)).order_by(_table.c.id.desc())
    if int(connection.scalar(select(func.count()).select_from(ended.subquery())) or 0) > KEPT:
        too_old = list(connection.scalars(ended.offset(KEPT)))
        connection.execute(delete(_table).where(_table.c.id.in_(too_old)))
