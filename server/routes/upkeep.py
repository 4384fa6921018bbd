"""Garbage collection and verification over HTTP. Verifying reads the whole store: that is the operator's affair."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Body, Depends, Response
from pydantic import BaseModel, ConfigDict, Field

from server.auth import require
from server.routes.versions import WaitSeconds
from server.services import Wired

collecting = APIRouter(prefix="/v1/adapters", tags=["adapters"], dependencies=[Depends(require("publish"))])
verifying = APIRouter(prefix="/v1/adapters", tags=["adapters"], dependencies=[Depends(require("admin"))])


class Collecting(BaseModel):
    model_config = ConfigDict(extra="forbid")

    keep: int | None = Field(default=None, ge=1)
    """Newest versions that stay; by default the setting `keep_versions`, and without it all."""
    dry_run: bool = False
    name: str | None = None
    """One adapter alone."""


class Verifying(BaseModel):
    model_config = ConfigDict(extra="forbid")

    repair: bool = False


EVERYTHING, LOOK = Collecting(), Verifying()


@collecting.post("/gc")
async def collect(
    wired: Wired, response: Response, asked: Annotated[Collecting, Body()] = EVERYTHING, wait_s: WaitSeconds = 30
) -> dict[str, Any]:
    """What went, what stays and why. 202 when some of it still drains after `wait_s`."""
    keep = asked.keep or wired.settings.keep_versions
    collected, done = await wired.upkeep.collect(keep, name=asked.name, dry_run=asked.dry_run, wait_s=wait_s)
    if not done:
        response.status_code = 202
    return collected.to_json() | {"keep": keep, "done": done}


@verifying.post("/verify")
async def verify(wired: Wired, asked: Annotated[Verifying, Body()] = LOOK) -> dict[str, Any]:
    """Hashes every file again. `repair`: also put right what can be, and take out of service what cannot."""
    return (await wired.upkeep.verify(repair=asked.repair)).to_json()
