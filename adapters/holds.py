"""What holds versions of an adapter beside its aliases, read from the rows, and the judgement that follows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from sqlalchemy import Connection, select

from adapters import rows, schema
from adapters.errors import Conflict
from adapters.records import Adapter, Move, Version
from adapters.retention import Holds, Judgement, judge

INCOMING = {"fetch", "fine_tune"}
"""Kinds of jobs that bring a version in: their `name` is where it goes, and needs no version that is there."""
READING = ("merge", "export")
"""Kinds of jobs that no deletion takes a version from. Their `params` name versions as `name@number`."""


def judge_all(
    connection: Connection, name: str, keep: int | None, in_use: Callable[[Version], bool]
) -> list[Judgement]:
    """Every version of the adapter, oldest first. See `adapters.retention.judge`."""
    adapter = rows.read_adapter(connection, name)
    holds = Holds(
        frozenset(_shadows(connection, adapter.name)),
        frozenset(_ways_back(connection, adapter)),
        frozenset(_named_by_jobs(connection)),
    )
    return judge(adapter, keep, holds, in_use)


def require_unread(connection: Connection, going: Sequence[Version]) -> None:
    """Conflict where a job that has not ended reads one of these versions."""
    table, refs = schema.jobs, {version.ref for version in going}
    reading = select(table).where(table.c.ended_at.is_(None), table.c.kind.in_(READING))
    for job in connection.execute(reading):
        if held := sorted(refs.intersection(_words(job.params))):
            raise Conflict(
                f"{held[0]} is read by {job.id}, which is to {job.kind} it; wait for that, or cancel it first",
                code="version_in_use",
            )


def last_move(moves: Sequence[tuple[int, Move]]) -> tuple[int, Move] | None:
    """The one that a rollback would take back. `moves`: with their row numbers, the latest first."""
    return next((each for each in moves if not each[1].undone and each[1].how != "rollback"), None)


def _shadows(connection: Connection, name: str) -> list[int]:
    table = schema.alias_shadows
    return list(connection.scalars(select(table.c.number).where(table.c.adapter == name)))


def _ways_back(connection: Connection, adapter: Adapter) -> Iterator[int]:
    for alias in adapter.targets:
        last = last_move(rows.read_moves(connection, adapter.name, alias))
        if last is not None:
            yield from last[1].old


def _named_by_jobs(connection: Connection) -> Iterator[str]:
    """Every word that a job which has not ended was given or has found: a name among them is a hold."""
    table = schema.jobs
    for job in connection.execute(select(table).where(table.c.ended_at.is_(None))):
        params = {key: value for key, value in job.params.items() if key != "name" or job.kind not in INCOMING}
        yield from _words([params, job.progress, job.result])


def _words(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _words(list(value.values()))
    elif isinstance(value, list):
        for each in value:
            yield from _words(each)
