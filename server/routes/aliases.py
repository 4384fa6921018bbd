"""Aliases over HTTP: where they point, moving them, taking a move back."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Body, Depends

from adapters.names import DEFAULT
from adapters.targets import to_json
from server.auth import Publisher, require
from server.errors import BadRequest
from server.routes.shapes import adapter_json, moment_of, move_json
from server.services import Wired

reading = APIRouter(prefix="/v1/adapters", tags=["adapters"], dependencies=[Depends(require("infer"))])
changing = APIRouter(prefix="/v1/adapters", tags=["adapters"], dependencies=[Depends(require("publish"))])


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
        "moves": [move_json(move) for move in moves],
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
    return adapter_json(
        await asyncio.to_thread(wired.registry.set_alias, name, alias, target, by=caller.id), moment_of(wired)
    )


@changing.delete("/{name}/aliases/{alias}")
async def remove_alias(name: str, alias: str, wired: Wired, caller: Publisher) -> dict[str, Any]:
    return adapter_json(
        await asyncio.to_thread(wired.registry.remove_alias, name, alias, by=caller.id), moment_of(wired)
    )


@changing.post("/{name}/rollback")
async def rollback(
    name: str, wired: Wired, caller: Publisher, alias: Annotated[str, Body(embed=True)] = DEFAULT
) -> dict[str, Any]:
    """Take back the last move of the alias. Requests that run finish on the version they began with."""
    return adapter_json(await asyncio.to_thread(wired.registry.rollback, name, alias, by=caller.id), moment_of(wired))
