"""As much of `/v1/completions` as the load generator asks for, in front of a rival that has no such server.

Token numbers in, server-sent events out, greedy, no end token, one request at a time.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Collection, Iterator
from typing import Any, Protocol

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse


class Decoder(Protocol):
    @property
    def models(self) -> Collection[str]: ...

    def tokens(self, model: str, prompt: list[int], count: int) -> Iterator[int]:
        """Generates; does not run twice at once."""

    def text(self, token: int) -> str: ...


def serve(decoder: Decoder, port: int) -> None:
    uvicorn.run(create_app(decoder), host="127.0.0.1", port=port, log_level="warning")


def create_app(decoder: Decoder) -> FastAPI:
    app = FastAPI()
    turn = asyncio.Lock()

    @app.get("/health")
    async def health() -> Response:
        return Response()

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        body = await request.json()
        if body["model"] not in decoder.models:
            known = ", ".join(decoder.models)
            message = f"unknown model {body['model']}; this server has {known} (without adapters: --suite base)"
            return JSONResponse({"error": {"message": message}}, 404)
        return StreamingResponse(_events(decoder, turn, body), media_type="text/event-stream")

    return app


async def _events(decoder: Decoder, turn: asyncio.Lock, body: dict[str, Any]) -> AsyncIterator[str]:
    async with turn:
        tokens = decoder.tokens(body["model"], body["prompt"], body["max_tokens"])
        while (token := await asyncio.to_thread(next, tokens, None)) is not None:
            text = decoder.text(token)
            yield f"data: {json.dumps({'choices': [{'index': 0, 'text': text}]})}\n\n"
    usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": body["max_tokens"]}
    yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n"
