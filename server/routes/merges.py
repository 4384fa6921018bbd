"""Merges over HTTP: one adapter into its base, or several into a new adapter. Each is a job. Needs `publish`."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Depends, Request, Response

from server.auth import Publisher, require
from server.merge_fields import MergeFields, read_body
from server.request_body import read_json
from server.routes.jobs import job_json
from server.services import Wired

router = APIRouter(prefix="/v1/merges", tags=["merging"], dependencies=[Depends(require("publish"))])


@router.post("", status_code=202)
async def create_merge(request: Request, wired: Wired, response: Response, caller: Publisher) -> dict[str, Any]:
    """JSON: the fields of `MergeFields`."""
    fields = read_body(await read_json(request, wired.settings.max_request_bytes), MergeFields)
    job = await asyncio.to_thread(wired.merges.ask, fields, caller.id)
    wired.runner.wake()
    response.headers["location"] = f"/v1/jobs/{job.id}"
    return job_json(job)
