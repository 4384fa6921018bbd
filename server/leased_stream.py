"""A streamed answer that holds what was lent to it, turn and lease, until its client has it or is gone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from server import problems
from server.errors import AdapterUnavailable
from server.running import Use


class LeasedStream(StreamingResponse):
    """Server-sent events that hold a lease: it is given back even if the client left before the first event."""

    def __init__(self, use: Use, events: AsyncIterator[str], held: AsyncExitStack, headers: dict[str, str]) -> None:
        content = _until_cut(use, events)
        super().__init__(content, media_type="text/event-stream", headers={"cache-control": "no-cache", **headers})
        self._use = use
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with self._use.stoppable():
                await super().__call__(scope, receive, send)
        finally:
            await asyncio.shield(self._held.aclose())


async def _until_cut(use: Use, events: AsyncIterator[str]) -> AsyncIterator[str]:
    """The engine's events; those of a request that is cut off end with an error."""
    try:
        while True:
            with use:
                event = await anext(events)
            yield event
    except StopAsyncIteration:
        return
    except AdapterUnavailable as error:
        yield problems.event(problems.status_of(error), error.message, code=error.code)
        yield "data: [DONE]\n\n"
