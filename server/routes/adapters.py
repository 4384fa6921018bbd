"""Adapters over HTTP: upload, list, show, delete. Reading needs `infer`, changing needs `publish`."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response
from pydantic import BaseModel, ConfigDict

from adapters.records import CHECKING
from adapters.registry import Keep
from adapters.upload import UploadLimits
from server import uploads
from server.auth import Publisher, require
from server.routes.shapes import adapter_json, moment_of, shown_version
from server.routes.versions import WaitSeconds, drain
from server.services import Wired
from server.upload_fields import read_fields

reading = APIRouter(prefix="/v1/adapters", tags=["adapters"], dependencies=[Depends(require("infer"))])
changing = APIRouter(prefix="/v1/adapters", tags=["adapters"], dependencies=[Depends(require("publish"))])


class AdapterEdit(BaseModel):
    model_config = ConfigDict(extra="forbid")

    description: str | None = None
    tags: dict[str, str | None] = {}


PAGE = 1000
"""Adapters in an answer, at most and by default."""


@changing.post("", status_code=201)
async def upload(request: Request, wired: Wired, response: Response, caller: Publisher) -> dict[str, Any]:
    """Multipart: the fields of `UploadFields`, and the files."""
    limits = UploadLimits(wired.settings.max_upload_bytes, wired.settings.max_upload_files)
    async with uploads.receive(request, limits) as received:
        fields = read_fields(received.fields)
        version, created = await wired.admission.upload(fields.name, received.files, fields.options(by=caller.id))
    if version.state == CHECKING:
        response.status_code = 202
    elif not created:
        response.status_code = 200
    response.headers["location"] = f"/v1/adapters/{version.adapter}/versions/{version.number}"
    return await shown_version(wired, version) | {"created": created}


@reading.get("")
async def list_adapters(
    wired: Wired, after: str = "", limit: Annotated[int, Query(ge=1, le=PAGE)] = PAGE
) -> dict[str, Any]:
    """In the order of their names. Where there are more, `has_more` is true and `last_id` is the next `after`."""
    found = await asyncio.to_thread(wired.registry.adapters, after=after, limit=limit + 1)
    shown, moment = found[:limit], moment_of(wired)
    return {
        "object": "list",
        "data": [adapter_json(adapter, moment) for adapter in shown],
        "has_more": len(found) > limit,
        "first_id": shown[0].name if shown else None,
        "last_id": shown[-1].name if shown else None,
    }


@reading.get("/{name}")
async def get_adapter(name: str, wired: Wired) -> dict[str, Any]:
    return adapter_json(await asyncio.to_thread(wired.registry.adapter, name), moment_of(wired))


@changing.patch("/{name}")
async def edit_adapter(name: str, wired: Wired, edit: AdapterEdit) -> dict[str, Any]:
    """`description` (null takes it away) and `tags`; a tag that is null goes, those not named stay."""
    description = edit.description if "description" in edit.model_fields_set else Keep.IT
    await asyncio.to_thread(wired.registry.edit, name, description=description, tags=edit.tags)
    return await get_adapter(name, wired)


@changing.delete("/{name}")
async def delete_adapter(name: str, wired: Wired, response: Response, wait_s: WaitSeconds = 30) -> dict[str, Any]:
    """The adapter and all its versions, drained."""
    adapter = await asyncio.to_thread(wired.registry.adapter, name)
    return await drain(wired, list(adapter.versions), wait_s, response) | {"name": name}
