"""Versions over HTTP: list, show one, its tags and its model card, delete."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Query, Request, Response
from fastapi.responses import FileResponse
from pydantic import BaseModel, ConfigDict

from adapters.card import generated
from adapters.listing import Wanted
from adapters.registry import Version
from adapters.upload import README
from server.auth import require
from server.routes.answers import Expected, page, tagged
from server.routes.queries import PAGE, Limit, wanted_versions
from server.routes.shapes import detail_json, moment_of, versions_json
from server.services import Services, Wired

reading = APIRouter(prefix="/v1/adapters", tags=["adapters"], dependencies=[Depends(require("infer"))])
changing = APIRouter(prefix="/v1/adapters", tags=["adapters"], dependencies=[Depends(require("publish"))])
MARKDOWN = "text/markdown; charset=utf-8"
AS_IT_IS = {"x-content-type-options": "nosniff", "content-security-policy": "default-src 'none'; sandbox"}
"""A stranger wrote it: no browser may take it for a page of ours."""
Number = Annotated[int, Path(ge=1)]
WaitSeconds = Annotated[float, Query(alias="wait_s", ge=0, le=600)]


class VersionEdit(BaseModel):
    model_config = ConfigDict(extra="forbid")

    tags: dict[str, str | None] = {}


@reading.get("/{name}/versions")
async def list_versions(
    request: Request,
    name: str,
    wired: Wired,
    asked: Annotated[Wanted, Depends(wanted_versions)],
    after: Annotated[int, Query(ge=0, lt=10**9)] = 0,
    limit: Limit = PAGE,
) -> Response:
    """In the order of their numbers. Where there are more, `has_more` is true and `last_id` is the next `after`."""
    found = await asyncio.to_thread(wired.registry.page, name, asked, after=after, limit=limit + 1)
    shown = versions_json(found, moment_of(wired))
    return tagged(request, page(shown[:limit], "version", len(shown) > limit), found.revision)


@reading.get("/{name}/versions/{ref}")
async def get_version(request: Request, name: str, ref: str, wired: Wired) -> Response:
    """`ref`: a version number, an alias, `latest` or `sha256:…`."""
    version = await asyncio.to_thread(wired.registry.resolve, name, ref)
    about = await asyncio.to_thread(wired.registry.about, version)
    return tagged(request, detail_json(version, about, moment_of(wired)), about.revision)


@reading.get("/{name}/versions/{ref}/card")
async def get_card(name: str, ref: str, wired: Wired) -> Response:
    """Its README.md, or where it came with none, a page of what is known of it. Markdown."""
    version = await asyncio.to_thread(wired.registry.resolve, name, ref)
    if README in version.manifest.files:
        files = await wired.fetches.path(version.digest)
        return FileResponse(files / README, media_type=MARKDOWN, headers=AS_IT_IS)
    about = await asyncio.to_thread(wired.registry.about, version)
    return Response(generated(version, about), media_type=MARKDOWN, headers=AS_IT_IS)


@reading.get("/{name}/versions/{ref}/fidelity")
async def get_fidelity(name: str, ref: str, wired: Wired) -> dict[str, Any]:
    """What was measured when it was merged last: in short, and the whole report."""
    version = await asyncio.to_thread(wired.registry.resolve, name, ref)
    found = await asyncio.to_thread(wired.registry.merge_report, version)
    return {
        "object": "adapter.fidelity",
        "name": version.adapter,
        "version": version.number,
        "digest": version.digest,
        "measured_at": int(found["at"].timestamp()),
        "summary": found["summary"],
        "report": found["report"],
    }


@changing.patch("/{name}/versions/{number}")
async def edit_version(
    request: Request, name: str, number: Number, wired: Wired, edit: VersionEdit, expected: Expected
) -> Response:
    """`tags`: one that is null goes, those not named stay. The files of a version never change."""
    await asyncio.to_thread(wired.registry.edit, name, number, tags=edit.tags, expected=expected)
    return await get_version(request, name, str(number), wired)


@changing.delete("/{name}/versions/{number}")
async def delete_version(
    name: str, number: int, wired: Wired, response: Response, wait_s: WaitSeconds = 30, force: bool = False
) -> dict[str, Any]:
    """Drains: running requests finish, then engine memory, then the files go. 202 when that takes over `wait_s`.

    `force`: running requests are cut off; `cut` says how many of which version.
    """
    return await drain(wired, await wired.lifecycle.remove(name, number), wait_s, force, response)


async def drain(
    wired: Services,
    going: Sequence[tuple[Version, asyncio.Task[None]]],
    wait_s: float,
    force: bool,
    response: Response,
) -> dict[str, Any]:
    cut = {version.ref: await wired.lifecycle.cut(version) for version, _ in going} if force else {}
    pending: set[asyncio.Task[None]] = set()
    if going:
        ended, pending = await asyncio.wait([task for _, task in going], timeout=wait_s)
        for task in ended:
            task.result()  # a deletion that failed is an answer, too
    if pending:
        response.status_code = 202
    return {
        "object": "adapter.deleted",
        "versions": [version.ref for version, _ in going],
        "cut": {ref: requests for ref, requests in cut.items() if requests},
        "deleted": not pending,
    }
