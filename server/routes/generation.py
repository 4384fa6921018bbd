"""OpenAI's generation endpoints. The engine validates the body; the `model` field names the adapter."""

from __future__ import annotations

from fastapi import APIRouter, Depends, Request, Response

from server.auth import Reader, require
from server.keys import ANYONE_ON_LOOPBACK, Caller
from server.services import Wired

router = APIRouter(tags=["generation"], dependencies=[Depends(require("infer"))])


@router.post("/v1/chat/completions")
async def chat_completions(request: Request, wired: Wired, caller: Reader) -> Response:
    return await wired.generator.answer("chat", request, _key(caller))


@router.post("/v1/completions")
async def completions(request: Request, wired: Wired, caller: Reader) -> Response:
    return await wired.generator.answer("completions", request, _key(caller))


def _key(caller: Caller) -> str | None:
    return None if caller is ANYONE_ON_LOOPBACK else caller.id
