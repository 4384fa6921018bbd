"""Adapters over HTTP: upload, list, show, move aliases, delete. Reading needs `infer`, changing needs `publish`."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Body, Depends, Query, Request, Response

from adapters.errors import Conflict
from adapters.names import DEFAULT
from adapters.registry import Adapter, Move, Version
from adapters.targets import Target, to_json
from adapters.upload import UploadLimits
from server import uploads
from server.auth import Publisher, require
from server.errors import BadRequest
from server.resolve import engine_name
from server.services import Services, Wired

reading = APIRouter(prefix="/v1/adapters", tags=["adapters"], dependencies=[Depends(require("infer"))])
changing = APIRouter(prefix="/v1/adapters", tags=["adapters"], dependencies=[Depends(require("publish"))])
PAGE = 1000
"""Adapters in an answer, at most and by default."""
WaitSeconds = Annotated[float, Query(alias="wait_s", ge=0, le=600)]


@changing.post("", status_code=201)
async def upload(request: Request, wired: Wired, response: Response, caller: Publisher) -> dict[str, Any]:
    """Multipart: `name`, optional `description` and `promote` (true: the default alias moves), and the files."""
    limits = UploadLimits(wired.settings.max_upload_bytes, wired.settings.max_upload_files)
    async with uploads.receive(request, limits) as received:
        name = received.fields.get("name", "")
        version, created = await asyncio.to_thread(
            wired.ingest.upload,
            name,
            received.files,
            description=received.fields.get("description"),
            promote=_flag(received.fields, "promote"),
            by=caller.id,
        )
    if not created:
        response.status_code = 200
    response.headers["location"] = f"/v1/adapters/{version.adapter}/versions/{version.number}"
    return await _show_version(wired, version) | {"created": created}


@reading.get("")
async def list_adapters(
    wired: Wired, after: str = "", limit: Annotated[int, Query(ge=1, le=PAGE)] = PAGE
) -> dict[str, Any]:
    """In the order of their names. Where there are more, `has_more` is true and `last_id` is the next `after`."""
    found = await asyncio.to_thread(wired.registry.adapters, after=after, limit=limit + 1)
    shown = found[:limit]
    return {
        "object": "list",
        "data": [_adapter(adapter, wired) for adapter in shown],
        "has_more": len(found) > limit,
        "first_id": shown[0].name if shown else None,
        "last_id": shown[-1].name if shown else None,
    }


@reading.get("/{name}")
async def get_adapter(name: str, wired: Wired) -> dict[str, Any]:
    return _adapter(await asyncio.to_thread(wired.registry.adapter, name), wired)


@reading.get("/{name}/versions/{ref}")
async def get_version(name: str, ref: str, wired: Wired) -> dict[str, Any]:
    """`ref`: a version number, an alias, `latest` or `sha256:…`."""
    version = await asyncio.to_thread(wired.registry.resolve, name, ref)
    return await _show_version(wired, version)


@reading.get("/{name}/aliases/{alias}")
async def get_alias(name: str, alias: str, wired: Wired) -> dict[str, Any]:
    """Where it points, and its moves, the latest first."""
    adapter = await asyncio.to_thread(wired.registry.adapter, name)
    moves = await asyncio.to_thread(wired.registry.moves, name, alias)
    return {
        "object": "adapter.alias",
        "name": name,
        "alias": alias,
        "version": adapter.aliases.get(alias),
        "split": to_json(adapter.splits.get(alias, {})) or None,
        "moves": [_move(move) for move in moves],
    }


@changing.put("/{name}/aliases/{alias}")
async def set_alias(
    name: str,
    alias: str,
    wired: Wired,
    caller: Publisher,
    version: Annotated[int | None, Body()] = None,
    split: Annotated[dict[int, int] | None, Body()] = None,
) -> dict[str, Any]:
    """To one version, or to several that share its traffic: `{"split": {"3": 90, "4": 10}}`."""
    if version is not None and split is None:
        target = {version: 1}
    elif split is not None and version is None:
        target = split
    else:
        raise BadRequest("expected either `version` or `split`", param="version" if split is None else "split")
    return _adapter(await asyncio.to_thread(wired.registry.set_alias, name, alias, target, by=caller.id), wired)


@changing.delete("/{name}/aliases/{alias}")
async def remove_alias(name: str, alias: str, wired: Wired, caller: Publisher) -> dict[str, Any]:
    return _adapter(await asyncio.to_thread(wired.registry.remove_alias, name, alias, by=caller.id), wired)


@changing.post("/{name}/rollback")
async def rollback(
    name: str, wired: Wired, caller: Publisher, alias: Annotated[str, Body(embed=True)] = DEFAULT
) -> dict[str, Any]:
    """Take back the last move of the alias. Requests that run finish on the version they began with."""
    return _adapter(await asyncio.to_thread(wired.registry.rollback, name, alias, by=caller.id), wired)


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
    return await _delete(wired, [version], wait_s, response)


@changing.delete("/{name}")
async def delete_adapter(name: str, wired: Wired, response: Response, wait_s: WaitSeconds = 30) -> dict[str, Any]:
    """The adapter and all its versions, drained."""
    adapter = await asyncio.to_thread(wired.registry.adapter, name)
    return await _delete(wired, list(adapter.versions), wait_s, response) | {"name": name}


async def _delete(wired: Services, versions: list[Version], wait_s: float, response: Response) -> dict[str, Any]:
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


def _adapter(adapter: Adapter, wired: Services) -> dict[str, Any]:
    return {
        "object": "adapter",
        "name": adapter.name,
        "description": adapter.description,
        "created_at": int(adapter.created_at.timestamp()),
        "aliases": adapter.aliases,
        "splits": {alias: to_json(target) for alias, target in adapter.splits.items()},
        "versions": [_version(version, adapter.aliases_of(version.number), wired) for version in adapter.versions],
    }


def _move(move: Move) -> dict[str, Any]:
    return {
        "from": _ends(move.old),
        "to": _ends(move.new),
        "how": move.how,
        "by": move.by,
        "at": int(move.at.timestamp()),
        "undone": move.undone,
    }


def _ends(target: Target) -> int | dict[str, int] | None:
    """A number, or a split, or none."""
    return to_json(target) if len(target) > 1 else next(iter(target), None)


async def _show_version(wired: Services, version: Version) -> dict[str, Any]:
    aliases = await asyncio.to_thread(wired.registry.aliases_of, version)
    return _version(version, aliases, wired) | {
        "verdict": version.manifest.verdict,
        "manifest": version.manifest.to_json(),
    }


def _version(version: Version, aliases: list[str], wired: Services) -> dict[str, Any]:
    held = wired.residency.snapshot().get(engine_name(version))
    return {
        "object": "adapter.version",
        "name": version.adapter,
        "version": version.number,
        "digest": version.digest,
        "state": version.state,
        "reason": version.reason,
        "created_at": int(version.created_at.timestamp()),
        "aliases": aliases,
        "resident": held is not None,
        "leases": held.leases if held else 0,
    }


def _flag(fields: dict[str, str], name: str) -> bool:
    given = fields.get(name, "true").lower()
    if given not in ("true", "false"):
        raise BadRequest(f"{name} is {given!r}, expected true or false", param=name)
    return given == "true"
