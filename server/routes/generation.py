"""OpenAI's generation endpoints. The engine validates the body; the `model` field names the adapter."""

from __future__ import annotations

from fastapi import APIRouter, Depends, Request, Response

from server.auth import require
from server.services import Wired

router = APIRouter(tags=["generation"], dependencies=[Depends(require("infer"))])


@router.post("/v1/chat/completions")
async def chat_completions(request: Request, wired: Wired) -> Response:
    return await wired.generator.answer("chat", request)


@router.post("/v1/completions")
async def completions(request: Request, wired: Wired) -> Response:
    return await wired.generator.answer("completions", request)
