"""Exports over HTTP: ask, list, show, download, delete. All of it needs `publish`: they are somebody's weights."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response

from adapters.export_store import Export
from server.auth import Publisher, require
from server.merge_fields import ExportFields, read_body
from server.request_body import read_json
from server.routes.answers import page
from server.routes.downloads import file_response, tar_response
from server.routes.jobs import job_json
from server.routes.queries import PAGE, Limit
from server.services import Services, Wired

router = APIRouter(prefix="/v1/exports", tags=["merging"], dependencies=[Depends(require("publish"))])
Offset = Annotated[str, Query(max_length=64)]


@router.post("", status_code=202)
async def create_export(request: Request, wired: Wired, response: Response, caller: Publisher) -> dict[str, Any]:
    """JSON: the fields of `ExportFields`. 200 for one that is ready already."""
    fields = read_body(await read_json(request, wired.settings.max_request_bytes), ExportFields)
    export, created = await asyncio.to_thread(wired.exports.ask, fields, caller.id)
    if created:
        wired.runner.wake()
    response.headers["location"] = f"/v1/exports/{export.id}"
    shown = await asyncio.to_thread(_shown, wired, export)
    if shown["state"] == "ready":
        response.status_code = 200
    return shown | {"created": created}


@router.get("")
async def list_exports(wired: Wired, after: Offset = "", limit: Limit = PAGE) -> dict[str, Any]:
    """The newest first, without the whole reports of their merges."""
    found = await asyncio.to_thread(wired.exports.exports)
    ids = [export.id for export in found]
    found = found[ids.index(after) + 1 if after in ids else 0 :]
    shown = await asyncio.to_thread(lambda: [_shown(wired, export, whole=False) for export in found[:limit]])
    return page(shown, "id", len(found) > limit)


@router.get("/{export_id}")
async def get_export(export_id: str, wired: Wired) -> dict[str, Any]:
    return await asyncio.to_thread(lambda: _shown(wired, wired.exports.export(export_id)))


@router.get("/{export_id}/files/{file}")
@router.head("/{export_id}/files/{file}", include_in_schema=False)
async def get_file(export_id: str, file: str, wired: Wired, request: Request) -> Response:
    """Its bytes; a part of them with `Range`. The ETag is the file's SHA-256."""
    export = await asyncio.to_thread(wired.exports.ready, export_id)
    facts = export.file(file)
    return file_response(request, wired.exports.path(export) / facts.name, facts.sha256)


@router.get("/{export_id}/archive")
async def get_archive(export_id: str, wired: Wired, request: Request) -> Response:
    """A tar with the files at its root, the same bytes each time."""
    export = await asyncio.to_thread(wired.exports.ready, export_id)
    paths = [wired.exports.path(export) / file.name for file in export.files]
    return tar_response(request, paths, export_id, f"{export_id}-{export.ready_at}")


@router.delete("/{export_id}")
async def delete_export(export_id: str, wired: Wired, caller: Publisher) -> dict[str, Any]:
    """With its files; a download that runs goes on. The job that makes it is cancelled."""
    job = await asyncio.to_thread(wired.exports.delete, export_id, caller.id)
    if job is not None:
        wired.runner.cancel(job.id)
        await asyncio.to_thread(wired.merging.ended, job)
    return {"id": export_id, "object": "export.deleted", "deleted": True}


def _shown(wired: Services, export: Export, *, whole: bool = True) -> dict[str, Any]:
    job = wired.exports.job(export)
    where = f"/v1/exports/{export.id}"
    return {
        "id": export.id,
        "object": "export",
        "state": wired.exports.state(export),
        "adapter": export.adapter,
        "digest": export.digest,
        "base": dict(export.base),
        "format": export.format,
        "options": dict(export.options),
        "size_bytes": export.size_bytes,
        "files": [
            {
                "name": file.name,
                "size_bytes": file.size_bytes,
                "sha256": file.sha256,
                "href": f"{where}/files/{file.name}",
            }
            for file in export.files
        ],
        "report": {key: value for key, value in export.report.items() if whole or key != "report"},
        "job": None if job is None else job_json(job),
        "created_by": export.created_by,
        "created_at": export.created_at,
        "ready_at": export.ready_at,
        "expires_at": export.expires_at,
    }
