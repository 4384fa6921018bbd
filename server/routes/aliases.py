"""Aliases over HTTP: where they point, moving them, taking a move back. With If-Match, only if nothing has changed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Body, Depends, Request, Response
from pydantic import BaseModel, ConfigDict

from adapters.errors import NotFound
from adapters.names import DEFAULT
from adapters.registry import Adapter, Keep, Shadow
from adapters.targets import Target
from server.auth import Publisher, require
from server.errors import BadRequest
from server.routes.answers import Expected, tagged
from server.routes.shapes import adapter_json, alias_json, moment_of, shadow_json
from server.services import Services, Wired

reading = APIRouter(prefix="/v1/adapters", tags=["adapters"], dependencies=[Depends(require("infer"))])
changing = APIRouter(prefix="/v1/adapters", tags=["adapters"], dependencies=[Depends(require("publish"))])


class ShadowEdit(BaseModel):
    model_config = ConfigDict(extra="forbid")

    version: int
    percent: int


class AliasEdit(BaseModel):
    model_config = ConfigDict(extra="forbid")

    version: int | None = None
    split: dict[int, int] | None = None
    shadow: ShadowEdit | None = None

    def target(self) -> Target | None:
        if self.version is not None and self.split is not None:
            raise BadRequest("expected either `version` or `split`, got both", param="split")
        if self.version is None and self.split is None and "shadow" not in self.model_fields_set:
            raise BadRequest("expected `version`, `split` or `shadow`", param="version")
        return self.split if self.version is None else {self.version: 1}

    def new_shadow(self) -> Shadow | Keep | None:
        if "shadow" not in self.model_fields_set:
            return Keep.IT
        return None if self.shadow is None else Shadow(self.shadow.version, self.shadow.percent)


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
    edit: AliasEdit,
) -> Response:
    """To one version, or to several that share its traffic: `{"split": {"3": 90, "4": 10}}`. Its `shadow`, which may be
    given alone, is `{"version": 4, "percent": 10}`, or null for none. To a version that is merge only while its merged
    engine is ready here."""
    change = partial(wired.registry.set_alias, name, alias, edit.target(), shadow=edit.new_shadow())
    moved = await _moved(wired, partial(change, by=caller.id, expected=expected))
    await wired.shadows.reload()
    return _changed(request, moved, wired)


@reading.get("/{name}/aliases/{alias}/shadow")
async def get_shadow(name: str, alias: str, wired: Wired) -> dict[str, Any]:
    """How the answers of its shadow compare with those that its clients got, since it was set or the server started."""
    found = await asyncio.to_thread(wired.registry.alias, name, alias)
    if found.shadow is None:
        raise NotFound(f"alias {alias!r} of {name} has no shadow; set one with PUT")
    tally = wired.shadows.tally((name, alias), found.shadow)
    return (
        {"object": "adapter.shadow", "name": name, "alias": alias} | (shadow_json(found.shadow) or {}) | tally.to_json()
    )


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
    moved = await _moved(wired, partial(wired.registry.rollback, name, alias, by=caller.id, expected=expected))
    return _changed(request, moved, wired)


async def _moved(wired: Services, change: Callable[[], Adapter]) -> Adapter:
    """No engine that the alias moves to goes meanwhile, and a restart builds it again."""
    async with wired.merged_versions.alone:
        await wired.promoter.write_down()
        return await asyncio.to_thread(change)


def _changed(request: Request, adapter: Adapter, wired: Services) -> Response:
    return tagged(request, adapter_json(adapter, moment_of(wired)), adapter.revision)
