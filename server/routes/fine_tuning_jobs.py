"""OpenAI's fine-tuning jobs: create, list, show, cancel, pause, resume, events, checkpoints. It takes `publish`."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request

from adapters.errors import NotFound
from adapters.job_rows import EVENTS_KEPT
from adapters.jobs import Job, Jobs
from server.auth import Publisher, require
from server.errors import BadRequest
from server.fine_tuning import KIND
from server.request_body import read_json
from server.routes.answers import page
from server.routes.fine_tuning_shapes import checkpoints_of, event_json, job_json
from server.routes.queries import Word
from server.services import Services, Wired

router = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["fine-tuning"], dependencies=[Depends(require("publish"))])
PREFIX = "ft"
"""Before the id of a job of ours it is an id as OpenAI's look: `ftjob-…`."""
EVENT = re.compile(r"ftevent-([0-9]{1,9})")
METADATA = re.compile(r"metadata\[(.{1,64})\]")
PAGE, MOST = 20, 100
SCAN = 200
"""Jobs read at a time where a list is filtered."""


@router.post("")
async def create_job(request: Request, wired: Wired, caller: Publisher) -> dict[str, Any]:
    body = await read_json(request, wired.settings.max_request_bytes)
    job = await asyncio.to_thread(wired.fine_tuning.ask, body, caller.id)
    wired.runner.wake()
    return job_json(job, wired.base.name)


@router.get("")
async def list_jobs(
    request: Request, wired: Wired, after: Word = None, limit: Annotated[int, Query(ge=1, le=MOST)] = PAGE
) -> dict[str, Any]:
    """The newest first; with `metadata[key]=value` those that have it, with `metadata=null` those without any."""
    wanted = _wanted_metadata(request)
    found = await asyncio.to_thread(_find, wired.jobs, (after or "").removeprefix(PREFIX), limit + 1, wanted)
    return page([job_json(job, wired.base.name) for job in found[:limit]], "id", len(found) > limit)


@router.get("/{job_id}")
async def get_job(job_id: str, wired: Wired) -> dict[str, Any]:
    return job_json(await _job(wired, job_id), wired.base.name)


@router.post("/{job_id}/cancel")
async def cancel_job(job_id: str, wired: Wired, caller: Publisher) -> dict[str, Any]:
    """At once where nobody works on it, else within a second."""
    known = await _job(wired, job_id)
    job = await asyncio.to_thread(wired.jobs.cancel, known.id, by=caller.id)
    wired.runner.cancel(job.id)
    await asyncio.to_thread(wired.fine_tuning.ended, job)
    return job_json(job, wired.base.name)


@router.post("/{job_id}/pause")
async def pause_job(job_id: str, wired: Wired, caller: Publisher) -> dict[str, Any]:
    """At once where nobody works on it, else after the step that is being taken."""
    known = await _job(wired, job_id)
    job = await asyncio.to_thread(wired.jobs.pause, known.id, by=caller.id)
    wired.runner.pause(job.id)
    return job_json(job, wired.base.name)


@router.post("/{job_id}/resume")
async def resume_job(job_id: str, wired: Wired, caller: Publisher) -> dict[str, Any]:
    known = await _job(wired, job_id)
    job = await asyncio.to_thread(wired.jobs.resume, known.id, by=caller.id)
    wired.runner.wake()
    return job_json(job, wired.base.name)


@router.get("/{job_id}/events")
async def list_events(
    job_id: str, wired: Wired, after: Word = None, limit: Annotated[int, Query(ge=1, le=EVENTS_KEPT)] = PAGE
) -> dict[str, Any]:
    """The newest first; `after` is the last one of the page before."""
    job = await _job(wired, job_id)
    found = await asyncio.to_thread(wired.jobs.latest_events, job.id, before=_event_number(after), limit=limit + 1)
    return page([event_json(event) for event in found[:limit]], "id", len(found) > limit)


@router.get("/{job_id}/checkpoints")
async def list_checkpoints(
    job_id: str, wired: Wired, after: Word = None, limit: Annotated[int, Query(ge=1, le=MOST)] = 10
) -> dict[str, Any]:
    """What can be chatted with: of a job that has succeeded its version, of any other nothing."""
    job = await _job(wired, job_id)
    return page([] if after else checkpoints_of(job)[:limit], "id", has_more=False)


async def _job(wired: Services, job_id: str) -> Job:
    if job_id.startswith(PREFIX):
        job = await asyncio.to_thread(wired.jobs.job, job_id.removeprefix(PREFIX))
        if job.kind == KIND:
            return job
    raise NotFound(f"there is no fine-tuning job {job_id[:80]!r}")


def _find(jobs: Jobs, after: str, wanted: int, metadata: Mapping[str, str] | None) -> list[Job]:
    found: list[Job] = []
    for job in _scan(jobs, after):
        given = job.params.get("metadata") or {}
        if (metadata is None and not given) or (metadata is not None and metadata.items() <= given.items()):
            found.append(job)
        if len(found) == wanted:
            break
    return found


def _scan(jobs: Jobs, after: str) -> Iterator[Job]:
    while some := jobs.jobs(after=after, limit=SCAN, kind=KIND):
        yield from some
        after = some[-1].id


def _wanted_metadata(request: Request) -> dict[str, str] | None:
    """None: those without any."""
    if "metadata" in request.query_params:
        if request.query_params["metadata"] != "null":
            raise BadRequest("metadata: expected metadata[key]=value, or metadata=null", param="metadata")
        return None
    pairs = ((METADATA.fullmatch(key), value) for key, value in request.query_params.items())
    return {key[1]: value for key, value in pairs if key}


def _event_number(after: str | None) -> int | None:
    if not after:
        return None
    found = EVENT.fullmatch(after)
    if found is None:
        raise BadRequest(f"after is {after[:80]!r}; expected the id of an event, as ftevent-12", param="after")
    return int(found[1])
