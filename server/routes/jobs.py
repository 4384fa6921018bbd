"""Jobs over HTTP: list, show, follow, cancel. All of it needs `publish`: a job tells what others take in."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query
from fastapi.responses import Response, StreamingResponse

from adapters.errors import AdapterError
from adapters.job_rows import EVENTS_KEPT
from adapters.jobs import Job, JobEvent, Jobs
from adapters.sources.address import shown
from server import problems
from server.auth import Publisher, require
from server.routes.answers import page
from server.routes.queries import PAGE, Limit, Word
from server.services import Wired

router = APIRouter(prefix="/v1/jobs", tags=["jobs"], dependencies=[Depends(require("publish"))])
FOLLOW_S = 0.5
"""Between two looks at a job that is followed."""
SILENCE_LOOKS = 30
"""After so many looks without news a comment is sent, so that nobody on the way takes the stream for dead."""

State = Literal["queued", "running", "paused", "succeeded", "failed", "cancelled"]


@router.get("")
async def list_jobs(wired: Wired, after: Word = "", limit: Limit = PAGE, state: State | None = None) -> dict[str, Any]:
    """The newest first. Where there are more, `has_more` is true and `last_id` is the next `after`."""
    found = await asyncio.to_thread(wired.jobs.jobs, after=after or "", limit=limit + 1, state=state)
    return page([job_json(job) for job in found[:limit]], "id", len(found) > limit)


@router.get("/{job_id}")
async def get_job(job_id: str, wired: Wired) -> dict[str, Any]:
    return job_json(await asyncio.to_thread(wired.jobs.job, job_id))


@router.get("/{job_id}/events", response_model=None)
async def job_events(
    job_id: str,
    wired: Wired,
    after: Annotated[int, Query(ge=0, lt=1 << 31)] = 0,
    limit: Annotated[int, Query(ge=1, le=EVENTS_KEPT)] = EVENTS_KEPT,
    stream: bool = False,
) -> Response | dict[str, Any]:
    """The oldest first, behind the event `after`. With `stream`, server-sent events until the job ends: its events,
    and the job itself whenever it has changed."""
    found = await asyncio.to_thread(wired.jobs.events, job_id, after=after, limit=limit + 1)
    if stream:
        return StreamingResponse(_follow(wired.jobs, job_id, after), media_type="text/event-stream")
    return page([event_json(event) for event in found[:limit]], "id", len(found) > limit)


@router.post("/{job_id}/cancel")
async def cancel_job(job_id: str, wired: Wired, caller: Publisher) -> dict[str, Any]:
    """At once where it has not begun, else as soon as its work notices."""
    job = await asyncio.to_thread(wired.jobs.cancel, job_id, by=caller.id)
    wired.runner.cancel(job_id)
    for noun in (wired.fine_tuning, wired.merging):
        await asyncio.to_thread(noun.ended, job)
    return job_json(job)


async def _follow(jobs: Jobs, job_id: str, after: int) -> AsyncIterator[str]:
    told: dict[str, Any] | None = None
    quiet = 0
    while True:
        try:
            job = await asyncio.to_thread(jobs.job, job_id)
            events = await asyncio.to_thread(jobs.events, job_id, after=after)  # second, or the last ones are missed
        except AdapterError as error:  # it was forgotten meanwhile
            status, message, code = problems.told(error)
            yield problems.event(status, message, code=code)
            return
        for event in events:
            yield _event(event_json(event))
            after = event.id
        news = job_json(job)
        if news != told:
            yield _event(news)
        if job.has_ended:
            yield "data: [DONE]\n\n"
            return
        quiet = 0 if events or news != told else quiet + 1
        told = news
        if quiet % SILENCE_LOOKS == SILENCE_LOOKS - 1:
            yield ": nothing new\n\n"
        await asyncio.sleep(FOLLOW_S)


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"


def job_json(job: Job) -> dict[str, Any]:
    source = {"source": shown(job.params["source"])} if "source" in job.params else {}
    return {
        "id": job.id,
        "object": "job",
        "kind": job.kind,
        "state": job.state,
        "params": {**job.params, **source},
        "progress": job.progress,
        "result": job.result,
        "error": job.error,
        "server": job.server,
        "attempts": job.attempts,
        "cancel_requested": job.cancel_requested,
        "created_by": job.created_by,
        "created_at": _seconds(job.created_at),
        "started_at": _seconds(job.started_at),
        "ended_at": _seconds(job.ended_at),
    }


def event_json(event: JobEvent) -> dict[str, Any]:
    return {
        "id": event.id,
        "object": "job.event",
        "job": event.job,
        "created_at": _seconds(event.at),
        "level": event.level,
        "message": event.message,
        "data": event.data,
    }


def _seconds(at: datetime | None) -> int | None:
    return None if at is None else int(at.timestamp())
