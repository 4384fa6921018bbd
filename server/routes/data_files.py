"""OpenAI's files: the data that training reads, and the tables it leaves. All of it needs `publish`."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import FileResponse

from adapters.file_store import DataFile
from adapters.upload import UploadLimits
from server import uploads
from server.auth import Publisher, require
from server.data_files import PURPOSE
from server.errors import BadRequest
from server.routes.answers import page
from server.routes.queries import Word
from server.services import Wired

router = APIRouter(prefix="/v1/files", tags=["files"], dependencies=[Depends(require("publish"))])
MOST = 10_000
"""Files in a list, at most and by default: OpenAI's figure."""


@router.post("")
async def create_file(request: Request, wired: Wired, caller: Publisher) -> dict[str, Any]:
    """Multipart: `file`, and `purpose`, which is `fine-tune`."""
    limit = wired.settings.max_upload_bytes
    async with uploads.receive(request, UploadLimits(limit, max_files=1)) as received:
        _require_fields(received.fields)
        if len(received.files) != 1:
            raise BadRequest("the form has no file; send one as `file`", param="file")
        (sent,) = received.files
        made = await asyncio.to_thread(
            wired.files.create, sent.stream, sent.filename, PURPOSE, by=caller.id, max_bytes=limit
        )
    return file_json(made)


@router.get("")
async def list_files(
    wired: Wired,
    after: Word = None,
    limit: Annotated[int, Query(ge=1, le=MOST)] = MOST,
    order: Literal["asc", "desc"] = "desc",
    purpose: Word = None,
) -> dict[str, Any]:
    """The newest first, or with `order=asc` the oldest."""
    found = await asyncio.to_thread(
        wired.files.files, after=after or "", limit=limit + 1, purpose=purpose, oldest_first=order == "asc"
    )
    return page([file_json(file) for file in found[:limit]], "id", len(found) > limit)


@router.get("/{file_id}")
async def get_file(file_id: str, wired: Wired) -> dict[str, Any]:
    return file_json(await asyncio.to_thread(wired.files.file, file_id))


@router.get("/{file_id}/content")
async def get_content(file_id: str, wired: Wired) -> FileResponse:
    path = await asyncio.to_thread(wired.files.path, file_id)
    headers = {"cache-control": "private, no-cache", "x-content-type-options": "nosniff"}
    return FileResponse(path, headers=headers, media_type="application/octet-stream")


@router.delete("/{file_id}")
async def delete_file(file_id: str, wired: Wired) -> dict[str, Any]:
    """A job that has begun keeps what it needs of it."""
    await asyncio.to_thread(wired.files.delete, file_id)
    return {"id": file_id, "object": "file", "deleted": True}


def _require_fields(fields: dict[str, str]) -> None:
    purpose = fields.get("purpose")
    if purpose != PURPOSE:
        raise BadRequest(
            f"purpose is {purpose!r:.80}; only {PURPOSE!r} is offered", param="purpose", code="unsupported"
        )
    if unknown := sorted(set(fields) - {"purpose"}):
        raise BadRequest(
            f"{unknown[0]:.80} is not offered: files stay until they are deleted",
            param=unknown[0][:80],
            code="unsupported",
        )


def file_json(file: DataFile) -> dict[str, Any]:
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.bytes,
        "created_at": file.created_at,
        "expires_at": None,
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
        "status_details": None,
    }
