"""Rows of jobs and their events, inside a transaction: read, changed by whoever owns the job, taken away, forgotten.

Knows no database of its own, and not who may ask for what.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, RowMapping, delete, insert, select, update

from adapters import schema
from adapters.errors import JobLost, NotFound
from adapters.job_records import CANCELLED, ENDED, FAILED, PAUSED, QUEUED, RUNNING, Job

KEPT = 1000
"""Ended jobs; older ones are forgotten, with their events."""
EVENTS_KEPT = 200
"""Of a job; the oldest go first."""
MESSAGE_CHARACTERS = 2000
MAX_ATTEMPTS = 5
"""A job whose worker died so often is what kills them."""

_jobs, _events = schema.jobs, schema.job_events


def now() -> datetime:
    return datetime.now(UTC)


def read(connection: Connection, job_id: str) -> Job:
    spelled = job_id.isascii() and job_id.isprintable()  # else the database driver itself may choke on it
    row = connection.execute(select(_jobs).where(_jobs.c.id == job_id)).mappings().one_or_none() if spelled else None
    if row is None:
        raise NotFound(f"there is no job {job_id[:80]!r}; the last {KEPT} that ended are kept")
    return as_job(row)


def as_job(row: RowMapping) -> Job:
    return Job(**row)


def change(connection: Connection, job_id: str, owner: str, /, **values: Any) -> None:
    """Raises JobLost where it is not the owner's any more."""
    mine = update(_jobs).where(_jobs.c.id == job_id, _jobs.c.worker == owner, _jobs.c.state == RUNNING)
    if not connection.execute(mine.values(**values)).rowcount:
        raise not_yours(job_id, owner)


def not_yours(job_id: str, worker: str) -> JobLost:
    return JobLost(f"{job_id} is no longer {worker}'s: it was silent too long, and another worker has it")


def take_away(
    connection: Connection, job_id: str, guard: tuple[Any, ...], why: str = "its worker was not heard of any more"
) -> bool:
    """From its worker, if `guard` still holds: queued again, or ended as somebody asked meanwhile."""
    job = read(connection, job_id)
    taking = update(_jobs).where(_jobs.c.id == job_id, *guard)
    values: dict[str, Any]
    if job.cancel_requested:
        values, message = {"state": CANCELLED, "ended_at": now()}, "cancelled; its worker was gone"
    elif job.pause_requested:
        values, message = {"state": PAUSED, "pause_requested": False}, "paused; its worker was gone"
    elif job.attempts >= MAX_ATTEMPTS:
        message = f"given up: its worker was lost {job.attempts} times, and may have died of it; the last time {why}"
        values = {"state": FAILED, "ended_at": now(), "error": {"code": "worker_lost", "message": message}}
    else:
        values, message = {"state": QUEUED}, f"{why}; queued again"
    if not connection.execute(taking.values(**values, worker=None)).rowcount:
        return False
    append(connection, job_id, message, "warning")
    return True


def append(
    connection: Connection, job_id: str, message: str, level: str = "info", data: Mapping[str, Any] | None = None
) -> None:
    kept = {"message": message[:MESSAGE_CHARACTERS], "level": level, "data": None if data is None else dict(data)}
    connection.execute(insert(_events).values(job=job_id, at=now(), **kept))
    newest = select(_events.c.id).where(_events.c.job == job_id).order_by(_events.c.id.desc())
    oldest_kept = connection.scalar(newest.offset(EVENTS_KEPT - 1).limit(1))
    if oldest_kept is not None:
        connection.execute(delete(_events).where(_events.c.job == job_id, _events.c.id < oldest_kept))


def forget_old(connection: Connection) -> None:
    ended = select(_jobs.c.id).where(_jobs.c.state.in_(ENDED)).order_by(_jobs.c.id.desc())
    too_old = list(connection.scalars(ended.offset(KEPT)))
    connection.execute(delete(_events).where(_events.c.job.in_(too_old)))
    connection.execute(delete(_jobs).where(_jobs.c.id.in_(too_old)))
