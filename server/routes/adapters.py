"""Adapters over HTTP: list, show, edit, delete. Reading needs `infer`, changing needs `publish`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from pydantic import BaseModel, ConfigDict

from adapters.listing import Wanted
from adapters.registry import Adapter, Keep, Overview
from server.auth import require
from server.routes.answers import Expected, page, tagged
from server.routes.queries import PAGE, Limit, Word, wanted
from server.routes.shapes import adapter_json, moment_of, overview_json
from server.routes.versions import WaitSeconds, drain
from server.services import Services, Wired

reading = APIRouter(prefix="/v1/adapters", tags=["adapters"], dependencies=[Depends(require("infer"))])
changing = APIRouter(prefix="/v1/adapters", tags=["adapters"], dependencies=[Depends(require("publish"))])


class AdapterEdit(BaseModel):
    model_config = ConfigDict(extra="forbid")

    description: str | None = None
    tags: dict[str, str | None] = {}


@reading.get("")
async def list_adapters(
    request: Request,
    wired: Wired,
    asked: Annotated[Wanted, Depends(wanted)],
    after: Word = "",
    limit: Limit = PAGE,
    summary: bool = False,
) -> Response:
    """In the order of their names. Where there are more, `has_more` is true and `last_id` is the next `after`.

    `summary`: how many versions each has in which state, in place of the versions.
    """
    find: Callable[..., Sequence[Adapter | Overview]] = wired.registry.overviews if summary else wired.registry.adapters
    found = await asyncio.to_thread(find, asked, after=after or "", limit=limit + 1)
    return tagged(request, page(_shown(found[:limit], wired), "name", len(found) > limit))


@reading.get("/{name}")
async def get_adapter(request: Request, name: str, wired: Wired, summary: bool = False) -> Response:
    find: Callable[[str], Adapter | Overview] = wired.registry.overview if summary else wired.registry.adapter
    adapter = await asyncio.to_thread(find, name)
    return tagged(request, _shown([adapter], wired)[0], adapter.revision)


@changing.patch("/{name}")
async def edit_adapter(request: Request, name: str, wired: Wired, edit: AdapterEdit, expected: Expected) -> Response:
    """`description` (null takes it away) and `tags`; a tag that is null goes, those not named stay."""
    description = edit.description if "description" in edit.model_fields_set else Keep.IT
    edited = wired.registry.edit
    await asyncio.to_thread(edited, name, description=description, tags=edit.tags, expected=expected)
    return await get_adapter(request, name, wired)


@changing.delete("/{name}")
async def delete_adapter(
    name: str, wired: Wired, response: Response, wait_s: WaitSeconds = 30, force: bool = False
) -> dict[str, Any]:
    """The adapter and all its versions, drained; `force` cuts off the requests that run."""
    return await drain(wired, await wired.lifecycle.remove(name), wait_s, force, response) | {"name": name}


def _shown(adapters: Sequence[Adapter | Overview], wired: Services) -> list[dict[str, Any]]:
    moment = moment_of(wired)
    return [
        adapter_json(each, moment) if isinstance(each, Adapter) else overview_json(each, moment) for each in adapters
    ]
