"""What an orchestrator asks: is the process alive, can it generate. The only routes that need no key."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Response

from server.errors import EngineUnavailable
from server.services import Wired

router = APIRouter(tags=["health"])


@router.get("/livez")
async def livez() -> dict[str, Any]:
    return {"status": "alive"}


@router.get("/readyz")
@router.get("/health")
async def readyz(wired: Wired, response: Response) -> dict[str, Any]:
    """200 only when a token can be generated: the engine itself is asked, not what we last heard of it."""
    try:
        await wired.pool.running().check_health()
    except EngineUnavailable as error:
        response.status_code = 503
        response.headers["retry-after"] = str(error.retry_after_s)
        return {"status": "restarting" if wired.pool.state == "ready" else wired.pool.state}
    return {"status": "ready"}
