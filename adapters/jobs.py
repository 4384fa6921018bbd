"""Durable jobs: a queue in the registry's database that any number of processes may work on.

    queued ── claim ──> running ── finish ──> succeeded
       │  <── recover ─────┤ └───── fail ───> failed
       ├────── cancel ─────┼── cancelled ───> cancelled
       └────── pause ──────┴── paused ──────> paused ── resume ──> queued

A worker claims a job, beats while it works, and ends it. When the beats stop, `recover` gives the job to somebody else,
and what the first worker says afterwards is refused: every one of its writes asks whether the job is still its own.
A job that is of use to one server alone names it and waits for it; `abandon` ends those of one that does not come
back. It does not know what the kinds of jobs do.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Collection, Mapping
from datetime import timedelta
from typing import Any

from sqlalchemy import func, insert, or_, select, update

from adapters import job_rows, schema
from adapters.database import Database
from adapters.errors import Conflict
from adapters.job_records import CANCELLED, ENDED, FAILED, PAUSED, QUEUED, RUNNING, SUCCEEDED, Job, JobEvent

__all__ = ["Job", "JobEvent", "Jobs"]

_jobs, _events = schema.jobs, schema.job_events


class Jobs:
    """Safe to share between threads; several processes may open the same database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def create(self, kind: str, params: Mapping[str, Any], *, by: str | None = None, server: str | None = None) -> Job:
        """`server`: the only one that may claim it; None: any may."""
        job_id, values = _new_id(), {"kind": kind, "state": QUEUED, "params": dict(params), "created_by": by}
        values["server"] = server
        with self._database.write() as connection:
            connection.execute(insert(_jobs).values(id=job_id, **values, progress={}, created_at=job_rows.now()))
            return job_rows.read(connection, job_id)

    def job(self, job_id: str) -> Job:
        with self._database.read() as connection:
            return job_rows.read(connection, job_id)

    def jobs(
        self, *, after: str = "", limit: int | None = None, state: str | None = None, kind: str | None = None
    ) -> list[Job]:
        """The newest first, those older than `after`."""
        query = select(_jobs).order_by(_jobs.c.id.desc()).limit(limit)
        query = query.where(_jobs.c.id < after) if after else query
        query = query.where(_jobs.c.state == state) if state else query
        query = query.where(_jobs.c.kind == kind) if kind else query
        with self._database.read() as connection:
            return [job_rows.as_job(row) for row in connection.execute(query).mappings()]

    def open_jobs(self, kind: str) -> list[Job]:
        """Those that wait or run, the newest first: by one look, for between two a job may go from one to the other."""
        query = select(_jobs).where(_jobs.c.kind == kind, _jobs.c.state.in_((QUEUED, RUNNING)))
        with self._database.read() as connection:
            return [job_rows.as_job(row) for row in connection.execute(query.order_by(_jobs.c.id.desc())).mappings()]

    def count(self, state: str, kinds: Collection[str]) -> int:
        query = select(func.count()).select_from(_jobs).where(_jobs.c.state == state, _jobs.c.kind.in_(kinds))
        with self._database.read() as connection:
            return int(connection.scalar(query) or 0)

    def events(self, job_id: str, *, after: int = 0, limit: int = job_rows.EVENTS_KEPT) -> list[JobEvent]:
        """The oldest first, those behind the event `after`."""
        query = select(_events).where(_events.c.job == job_id, _events.c.id > after).order_by(_events.c.id).limit(limit)
        with self._database.read() as connection:
            job_rows.read(connection, job_id)
            return [JobEvent(**row) for row in connection.execute(query).mappings()]

    def latest_events(
        self, job_id: str, *, before: int | None = None, limit: int = job_rows.EVENTS_KEPT
    ) -> list[JobEvent]:
        """The newest first, those that are older than the event `before`."""
        query = select(_events).where(_events.c.job == job_id).order_by(_events.c.id.desc()).limit(limit)
        query = query if before is None else query.where(_events.c.id < before)
        with self._database.read() as connection:
            job_rows.read(connection, job_id)
            return [JobEvent(**row) for row in connection.execute(query).mappings()]

    def claim(self, kinds: Collection[str], worker: str, server: str | None = None) -> Job | None:
        """The oldest queued job of these kinds, now this worker's; none where there is none. `server`: whose own jobs
        may be claimed beside those that are anybody's."""
        allowed = or_(_jobs.c.server.is_(None), _jobs.c.server == server)
        queued = (_jobs.c.state == QUEUED, _jobs.c.kind.in_(kinds), allowed)
        oldest = select(_jobs.c.id).where(*queued).order_by(_jobs.c.id).limit(1)
        with self._database.read() as connection:
            if connection.scalar(oldest) is None:  # nobody takes the write lock to look at an empty queue
                return None
        with self._database.write() as connection:
            while (job_id := connection.scalar(oldest)) is not None:
                now = job_rows.now()
                mine = {"state": RUNNING, "worker": worker, "started_at": now, "beat_at": now, "progress": {}}
                # Guarded by the state: of two workers that saw the same job, one finds it changed.
                claiming = update(_jobs).where(_jobs.c.id == job_id, _jobs.c.state == QUEUED)
                if connection.execute(claiming.values(**mine, attempts=_jobs.c.attempts + 1)).rowcount:
                    return job_rows.read(connection, job_id)
        return None

    def beat(self, job_id: str, worker: str, progress: Mapping[str, Any]) -> Job:
        """Say how far the work is. The job tells what was asked of it meanwhile. Raises JobLost."""
        with self._database.write() as connection:
            job_rows.change(connection, job_id, worker, beat_at=job_rows.now(), progress=dict(progress))
            return job_rows.read(connection, job_id)

    def event(
        self,
        job_id: str,
        worker: str,
        message: str,
        progress: Mapping[str, Any],
        *,
        data: Mapping[str, Any] | None = None,
    ) -> None:
        """Something that happened, and a beat: whoever reads the event finds the job as far. Raises JobLost."""
        with self._database.write() as connection:
            job_rows.change(connection, job_id, worker, beat_at=job_rows.now(), progress=dict(progress))
            job_rows.append(connection, job_id, message, data=data)

    def finish(self, job_id: str, worker: str, result: Mapping[str, Any], progress: Mapping[str, Any]) -> Job:
        """Raises JobLost."""
        return self._end(job_id, worker, "finished", state=SUCCEEDED, result=dict(result), progress=dict(progress))

    def fail(self, job_id: str, worker: str, code: str, message: str, **more: Any) -> Job:
        """Raises JobLost."""
        error = {"code": code, "message": message[: job_rows.MESSAGE_CHARACTERS], **more}
        return self._end(job_id, worker, f"failed: {message} ({code})", "error", state=FAILED, error=error)

    def cancelled(self, job_id: str, worker: str) -> Job:
        """The worker has stopped because it was asked to. Raises JobLost."""
        return self._end(job_id, worker, "cancelled", "warning", state=CANCELLED)

    def paused(self, job_id: str, worker: str) -> Job:
        """The worker has put the job aside because it was asked to. Raises JobLost."""
        with self._database.write() as connection:
            aside = {"state": PAUSED, "worker": None, "attempts": _jobs.c.attempts - 1, "pause_requested": False}
            job_rows.change(connection, job_id, worker, **aside)
            job_rows.append(connection, job_id, "paused", "warning")
            return job_rows.read(connection, job_id)

    def release(self, job_id: str, worker: str) -> Job:
        """Back into the queue, because the worker stops in good order. Raises JobLost."""
        with self._database.write() as connection:
            again = {"state": QUEUED, "worker": None, "attempts": _jobs.c.attempts - 1}
            job_rows.change(connection, job_id, worker, **again)
            job_rows.append(connection, job_id, "its worker stops; queued again")
            return job_rows.read(connection, job_id)

    def interrupted(self, job_id: str, worker: str, reason: str) -> Job:
        """What did the work died of it, perhaps; queued again, but not for ever. Raises JobLost."""
        with self._database.write() as connection:
            mine = (_jobs.c.worker == worker, _jobs.c.state == RUNNING)
            if not job_rows.take_away(connection, job_id, mine, reason):
                raise job_rows.not_yours(job_id, worker)
            return job_rows.read(connection, job_id)

    def cancel(self, job_id: str, *, by: str | None = None) -> Job:
        """At once where nobody works on it, else as soon as its worker listens. Conflict where it has ended."""
        with self._database.write() as connection:
            job_rows.read(connection, job_id)
            unclaimed = update(_jobs).where(_jobs.c.id == job_id, _jobs.c.state.in_((QUEUED, PAUSED)))
            running = update(_jobs).where(_jobs.c.id == job_id, _jobs.c.state == RUNNING)
            asked_by = f" by {by}" if by else ""
            if connection.execute(
                unclaimed.values(state=CANCELLED, ended_at=job_rows.now(), cancel_requested=True)
            ).rowcount:
                job_rows.append(connection, job_id, f"cancelled{asked_by} while nobody worked on it", "warning")
            elif connection.execute(running.where(~_jobs.c.cancel_requested).values(cancel_requested=True)).rowcount:
                job_rows.append(connection, job_id, f"asked to stop{asked_by}", "warning")
            job = job_rows.read(connection, job_id)
        if job.state in (SUCCEEDED, FAILED):
            raise _has_ended(job, "cancel")
        return job

    def pause(self, job_id: str, *, by: str | None = None) -> Job:
        """As `cancel`, but it can be resumed."""
        with self._database.write() as connection:
            job_rows.read(connection, job_id)
            asked_by = f" by {by}" if by else ""
            queued = update(_jobs).where(_jobs.c.id == job_id, _jobs.c.state == QUEUED)
            running = update(_jobs).where(_jobs.c.id == job_id, _jobs.c.state == RUNNING, ~_jobs.c.pause_requested)
            if connection.execute(queued.values(state=PAUSED)).rowcount:
                job_rows.append(connection, job_id, f"paused{asked_by}", "warning")
            elif connection.execute(running.values(pause_requested=True)).rowcount:
                job_rows.append(connection, job_id, f"asked to pause{asked_by}", "warning")
            job = job_rows.read(connection, job_id)
        if job.has_ended:
            raise _has_ended(job, "pause")
        return job

    def resume(self, job_id: str, *, by: str | None = None) -> Job:
        """Back into the queue. Nothing where it is not paused, nor about to be. Conflict where it has ended."""
        with self._database.write() as connection:
            job_rows.read(connection, job_id)
            paused = update(_jobs).where(_jobs.c.id == job_id, _jobs.c.state == PAUSED)
            asked = update(_jobs).where(_jobs.c.id == job_id, _jobs.c.state == RUNNING, _jobs.c.pause_requested)
            resumed = connection.execute(paused.values(state=QUEUED, pause_requested=False)).rowcount
            if resumed or connection.execute(asked.values(pause_requested=False)).rowcount:
                job_rows.append(connection, job_id, f"resumed by {by}" if by else "resumed")
            job = job_rows.read(connection, job_id)
        if job.has_ended:
            raise _has_ended(job, "resume")
        return job

    def recover(self, kinds: Collection[str], silent_s: float) -> list[Job]:
        """Queue again what a worker claimed and, by its silence, no longer works on."""
        silent = (
            _jobs.c.state == RUNNING,
            _jobs.c.kind.in_(kinds),
            _jobs.c.beat_at < job_rows.now() - timedelta(seconds=silent_s),
        )
        with self._database.read() as connection:
            found = list(connection.scalars(select(_jobs.c.id).where(*silent).order_by(_jobs.c.id)))
        if not found:
            return []
        with self._database.write() as connection:
            return [
                job_rows.read(connection, job_id) for job_id in found if job_rows.take_away(connection, job_id, silent)
            ]

    def abandon(self, server: str, why: str) -> list[Job]:
        """End what waits for a server that does not come back."""
        waiting = (_jobs.c.server == server, _jobs.c.state.in_((QUEUED, PAUSED)))
        with self._database.write() as connection:
            found = list(connection.scalars(select(_jobs.c.id).where(*waiting).order_by(_jobs.c.id)))
            values = {"state": FAILED, "ended_at": job_rows.now(), "error": {"code": "server_lost", "message": why}}
            ending = [
                job_id
                for job_id in found
                if connection.execute(update(_jobs).where(_jobs.c.id == job_id, *waiting).values(**values)).rowcount
            ]
            for job_id in ending:
                job_rows.append(connection, job_id, f"failed: {why} (server_lost)", "error")
            return [job_rows.read(connection, job_id) for job_id in ending]

    def _end(self, job_id: str, worker: str, message: str, level: str = "info", **values: Any) -> Job:
        assert values["state"] in ENDED, values
        with self._database.write() as connection:
            job_rows.change(connection, job_id, worker, ended_at=job_rows.now(), **values)
            job_rows.append(connection, job_id, message, level)
            job_rows.forget_old(connection)
            return job_rows.read(connection, job_id)


def _has_ended(job: Job, wanted: str) -> Conflict:
    return Conflict(f"{job.id} has {job.state} already; there is nothing to {wanted}", code="job_ended")


def _new_id() -> str:
    return f"job-{time.time_ns() // 1_000_000:011x}{secrets.token_hex(6)}"
