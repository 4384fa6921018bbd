"""Versions over HTTP: show, delete."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Response

from adapters.errors import Conflict
from adapters.registry import Version
from server.auth import require
from server.routes.shapes import shown_version
from server.services import Services, Wired

reading = APIRouter(prefix="/v1/adapters", tags=["adapters"], dependencies=[Depends(require("infer"))])
changing = APIRouter(prefix="/v1/adapters", tags=["adapters"], dependencies=[Depends(require("publish"))])
WaitSeconds = Annotated[float, Query(alias="wait_s", ge=0, le=600)]


@reading.get("/{name}/versions/{ref}")
async def get_version(name: str, ref: str, wired: Wired) -> dict[str, Any]:
    """`ref`: a version number, an alias, `latest` or `sha256:…`."""
    version = await asyncio.to_thread(wired.registry.resolve, name, ref)
    return await shown_version(wired, version)


@changing.delete("/{name}/versions/{number}")
async def delete_version(
    name: str, number: int, wired: Wired, response: Response, wait_s: WaitSeconds = 30
) -> dict[str, Any]:
    """Drains: running requests finish, then engine memory, then the files go. 202 when that takes over `wait_s`."""
    version = await asyncio.to_thread(wired.registry.resolve, name, str(number))
    if pointing := await asyncio.to_thread(wired.registry.aliases_of, version):
        raise Conflict(
            f"{version.ref} is what the alias {', '.join(pointing)} serves: move or remove the alias, "
            f"or delete the whole adapter {name}",
            code="version_in_use",
        )
    return await drain(wired, [version], wait_s, response)


async def drain(wired: Services, versions: list[Version], wait_s: float, response: Response) -> dict[str, Any]:
    tasks = [await wired.lifecycle.delete(version) for version in versions]
    pending: set[asyncio.Task[None]] = set()
    if tasks:
        ended, pending = await asyncio.wait(tasks, timeout=wait_s)
        for task in ended:
            task.result()  # a deletion that failed is an answer, too
    if pending:
        response.status_code = 202
    return {
        "object": "adapter.deleted",
        "versions": [version.ref for version in versions],
        "deleted": not pending,
    }
