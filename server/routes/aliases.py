"""Aliases over HTTP: where they point, moving them, taking a move back. With If-Match, only if nothing has changed."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter, Body, Depends, Request, Response

from adapters.names import DEFAULT
from adapters.registry import Adapter
from server.auth import Publisher, require
from server.errors import BadRequest
from server.routes.answers import Expected, tagged
from server.routes.shapes import adapter_json, alias_json, moment_of
from server.services import Services, Wired

reading = APIRouter(prefix="/v1/adapters", tags=["adapters"], dependencies=[Depends(require("infer"))])
changing = APIRouter(prefix="/v1/adapters", tags=["adapters"], dependencies=[Depends(require("publish"))])


@reading.get("/{name}/aliases/{alias}")
async def get_alias(request: Request, name: str, alias: str, wired: Wired) -> Response:
    """Where it points, and its moves, the latest first."""
    found = await asyncio.to_thread(wired.registry.alias, name, alias)
    return tagged(request, alias_json(found), found.revision)


@changing.put("/{name}/aliases/{alias}")
async def set_alias(
    request: Request,
    name: str,
    alias: str,
    wired: Wired,
    caller: Publisher,
    expected: Expected,
    version: Annotated[int | None, Body()] = None,
    split: Annotated[dict[int, int] | None, Body()] = None,
) -> Response:
    """To one version, or to several that share its traffic: `{"split": {"3": 90, "4": 10}}`."""
    if version is not None and split is None:
        target = {version: 1}
    elif split is not None and version is None:
        target = split
    else:
        raise BadRequest("expected either `version` or `split`", param="version" if split is None else "split")
    moved = await asyncio.to_thread(wired.registry.set_alias, name, alias, target, by=caller.id, expected=expected)
    return _changed(request, moved, wired)


@changing.delete("/{name}/aliases/{alias}")
async def remove_alias(
    request: Request, name: str, alias: str, wired: Wired, caller: Publisher, expected: Expected
) -> Response:
    left = await asyncio.to_thread(wired.registry.remove_alias, name, alias, by=caller.id, expected=expected)
    return _changed(request, left, wired)


@changing.post("/{name}/rollback")
async def rollback(
    request: Request,
    name: str,
    wired: Wired,
    caller: Publisher,
    expected: Expected,
    alias: Annotated[str, Body(embed=True)] = DEFAULT,
) -> Response:
    """Take back the last move of the alias. Requests that run finish on the version they began with."""
    moved = await asyncio.to_thread(wired.registry.rollback, name, alias, by=caller.id, expected=expected)
    return _changed(request, moved, wired)


def _changed(request: Request, adapter: Adapter, wired: Services) -> Response:
    return tagged(request, adapter_json(adapter, moment_of(wired)), adapter.revision)
