"""OpenAI's model list: the base, and every adapter that has a version to serve. vLLM's card, registry URIs as root."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Depends, Request, Response

from adapters.names import DEFAULT, NAME
from adapters.registry import Overview
from server.auth import require
from server.errors import ModelNotFound
from server.routes.answers import tagged
from server.services import Services, Wired

router = APIRouter(prefix="/v1/models", tags=["models"], dependencies=[Depends(require("infer"))])


@router.get("")
async def list_models(request: Request, wired: Wired) -> Response:
    return tagged(request, {"object": "list", "data": await _cards(wired)})


@router.get("/{model:path}")
async def get_model(model: str, wired: Wired) -> dict[str, Any]:
    if model == wired.base.name:
        return _base_card(wired)
    spelled = NAME.fullmatch(model) is not None
    for adapter in await asyncio.to_thread(wired.registry.served, model) if spelled else ():
        return _adapter_card(adapter, wired.base.name)
    raise ModelNotFound(f"The model `{model}` does not exist or you do not have access to it.", param="model")


async def _cards(wired: Services) -> list[dict[str, Any]]:
    served = await asyncio.to_thread(wired.registry.served)
    return [_base_card(wired), *(_adapter_card(adapter, wired.base.name) for adapter in served)]


def _base_card(wired: Services) -> dict[str, Any]:
    length = wired.pool.running().info.max_model_len if wired.pool.state == "ready" else None
    created = int(wired.base.path.stat().st_mtime)
    return _card(wired.base.name, created, root=wired.base.name, parent=None) | {"max_model_len": length}


def _adapter_card(adapter: Overview, base_name: str) -> dict[str, Any]:
    root = f"registry://{adapter.name}@{adapter.aliases[DEFAULT]}"
    return _card(adapter.name, int(adapter.created_at.timestamp()), root=root, parent=base_name)


def _card(identifier: str, created: int, *, root: str, parent: str | None) -> dict[str, Any]:
    return {
        "id": identifier,
        "object": "model",
        "created": created,
        "owned_by": "loraplex",
        "root": root,
        "parent": parent,
    }
