"""A version's merged engine over HTTP: have one built, look at it, fall back. It spends memory, so it needs `admin`."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

from fastapi import APIRouter, Depends, Response
from pydantic import BaseModel, ConfigDict, Field

from server.auth import Operator, require
from server.merged_orders import Quantization, Values
from server.routes.jobs import job_json
from server.routes.shapes import engine_json
from server.routes.versions import Number, WaitSeconds
from server.services import Wired

router = APIRouter(
    prefix="/v1/adapters/{name}/versions/{number}/merged", tags=["merged"], dependencies=[Depends(require("admin"))]
)


class Wish(BaseModel):
    model_config = ConfigDict(extra="forbid")

    base: Values = "served"
    quantization: Quantization | None = None
    accept_loss: bool = False
    validation_file: str | None = Field(default=None, max_length=100)


@router.put("")
async def promote(
    name: str,
    number: Number,
    wired: Wired,
    caller: Operator,
    response: Response,
    wish: Wish | None = None,
    wait_s: WaitSeconds = 0,
) -> dict[str, Any]:
    """200 with the engine where there is one already, else 202 with the job that merges and builds; with `wait_s` what
    has become of it by then. Requests take the LoRA path until it is ready."""
    version = await asyncio.to_thread(wired.registry.resolve, name, str(number))
    if (engine := wired.merged_versions.standing(version)) is not None:
        return engine_json(engine) | {"version": number}
    wish = wish or Wish()
    how = wish.model_dump(exclude={"base"})
    job = await asyncio.to_thread(partial(wired.merged_versions.ask, version, wish.base, caller.id, **how))
    wired.runner.wake()
    job = await wired.runner.ended(job.id, wait_s) if wait_s else job
    response.status_code = 202
    return job_json(job)


@router.get("")
async def show(name: str, number: Number, wired: Wired) -> dict[str, Any]:
    version = await asyncio.to_thread(wired.registry.resolve, name, str(number))
    return engine_json(wired.merged_versions.engine(version)) | {"version": number}


@router.delete("")
async def fall_back(
    name: str,
    number: Number,
    wired: Wired,
    caller: Operator,
    response: Response,
    wait_s: WaitSeconds = 30,
    force: bool = False,
) -> dict[str, Any]:
    """Requests take the LoRA path at once; those that run there end there. 202 where that takes over `wait_s`. Of a
    version that is merge only and that an alias serves, only with `force`."""
    version = await asyncio.to_thread(wired.registry.resolve, name, str(number))
    job, ending = await wired.merged_versions.fall_back(version, caller.id, force=force)
    if job is not None:
        wired.runner.cancel(job.id)
    _, pending = await asyncio.wait([ending], timeout=wait_s)
    if pending:
        response.status_code = 202
    return {"object": "merged_engine.ended", "version": version.ref, "job": job and job.id, "ended": not pending}
