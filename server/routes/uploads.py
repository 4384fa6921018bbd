"""Adapters in: the files in a form, or a JSON body that names a source, which makes a job. Needs `publish`."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse

from adapters.errors import JobCancelled
from adapters.job_records import SUCCEEDED, Job
from adapters.records import CHECKING
from adapters.registry import Version
from adapters.upload import UploadLimits
from server import problems, uploads
from server.auth import Publisher, require
from server.intake import SourceFields
from server.keys import Caller
from server.request_body import read_json
from server.routes.jobs import job_json
from server.routes.shapes import shown_version
from server.services import Services, Wired
from server.upload_fields import UploadFields, read_fields

router = APIRouter(prefix="/v1/adapters", tags=["adapters"], dependencies=[Depends(require("publish"))])


@router.post("", status_code=201, response_model=None)
async def upload(
    request: Request, wired: Wired, response: Response, caller: Publisher
) -> dict[str, Any] | JSONResponse:
    """Multipart: the fields of `UploadFields`, and the files. JSON: the fields of `SourceFields`."""
    if uploads.media_type(request) == "application/json":
        return await _fetch(request, wired, response, caller)
    limits = UploadLimits(wired.settings.max_upload_bytes, wired.settings.max_upload_files)
    async with uploads.receive(request, limits) as received:
        fields = read_fields(received.fields, UploadFields)
        version, created = await wired.admission.upload(fields.name, received.files, fields.options(by=caller.id))
    return await _taken_in(wired, response, version, created)


async def _fetch(
    request: Request, wired: Services, response: Response, caller: Caller
) -> dict[str, Any] | JSONResponse:
    fields = read_fields(await read_json(request, wired.settings.max_request_bytes), SourceFields)
    job = await asyncio.to_thread(wired.intake.ask, fields, caller.id)
    wired.runner.wake()
    if fields.wait_s:
        job = await wired.runner.ended(job.id, fields.wait_s)
    if job.state == SUCCEEDED and job.result is not None:
        version = await asyncio.to_thread(wired.registry.resolve, job.result["name"], str(job.result["version"]))
        return await _taken_in(wired, response, version, job.result["created"])
    if job.has_ended:
        return _as_upload_would(job)
    response.status_code = 202
    response.headers["location"] = f"/v1/jobs/{job.id}"
    return job_json(job)


async def _taken_in(wired: Services, response: Response, version: Version, created: bool) -> dict[str, Any]:
    if version.state == CHECKING:
        response.status_code = 202
    elif not created:
        response.status_code = 200
    response.headers["location"] = f"/v1/adapters/{version.adapter}/versions/{version.number}"
    return await shown_version(wired, version) | {"created": created}


def _as_upload_would(job: Job) -> JSONResponse:
    """The answer to whoever waited for a job that failed, or was cancelled."""
    why = job.error or {"status": 409, "code": JobCancelled.code, "message": f"{job.id} was cancelled"}
    status = why.get("status", 500)
    return JSONResponse(problems.body(status, why["message"], code=why["code"]), status)
