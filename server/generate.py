"""FLOW request: resolve → fetch → turn → lease → generate → answer. Turn and lease outlast the engine's work, always.

The flow of `Generator.answer` is the whole story; `LeasedStream` carries it on when the answer is streamed.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from server import problems
from server.engine.pool import EnginePool
from server.engine.protocol import Answer, Endpoint, Generation, Stats
from server.errors import AdapterUnavailable, BadRequest, CorruptedOutput, RequestTooLarge, ServerError
from server.fairness import BASE, Line, Turn, Turns
from server.fetches import Fetches
from server.lifecycle import Lifecycle
from server.residency import Residency
from server.resolve import Resolver, Target
from server.running import Running, Use
from server.shadow import Shadows
from server.telemetry import Telemetry

log = logging.getLogger(__name__)
Result = TypeVar("Result")


class Generator:
    """Answers generation requests; one for the whole server."""

    def __init__(
        self,
        pool: EnginePool,
        resolver: Resolver,
        fetches: Fetches,
        turns: Turns,
        residency: Residency,
        running: Running,
        lifecycle: Lifecycle,
        shadows: Shadows,
        telemetry: Telemetry,
        max_request_bytes: int,
    ) -> None:
        self._pool = pool
        self._resolver = resolver
        self._fetches = fetches
        self._turns = turns
        self._residency = residency
        self._running = running
        self._lifecycle = lifecycle
        self._shadows = shadows
        self._telemetry = telemetry
        self._max_request_bytes = max_request_bytes

    async def answer(self, endpoint: Endpoint, request: Request, key: str | None = None) -> Response:
        """One HTTP request in, one response out. A client that leaves takes its generation with it.

        `key`: the id of the caller's API key; where the body has no `user`, it is whose request this is.
        """
        body = await read_json(request, self._max_request_bytes)
        user = body.get("user")
        sticky = user if isinstance(user, str) and user else key
        target = await asyncio.to_thread(self._resolver.resolve, _model_of(body), sticky)
        return await _until_disconnect(request, lambda: self._generate(endpoint, body, target))

    async def _generate(self, endpoint: Endpoint, body: dict[str, Any], target: Target) -> Response:
        async with AsyncExitStack() as held:
            use = held.enter_context(self._running.entered(_line(target)))
            with use:
                answer = await self._begin(endpoint, body, target, held)
            if answer.events is None:
                return JSONResponse(answer.body, answer.status, _headers(target))
            return LeasedStream(use, answer.events, held.pop_all(), _headers(target))

    async def _begin(self, endpoint: Endpoint, body: dict[str, Any], target: Target, held: AsyncExitStack) -> Answer:
        """The whole answer, or one whose events are still to come; `held` has what must be given back behind it."""
        target = await self._fetches.at_hand(target)
        turn = await self._turn(body, target, held)
        adapter = None
        if target.version is not None:
            assert target.path is not None
            adapter = await held.enter_async_context(self._residency.lease(target.engine_name, target.path))
        engine = self._pool.running()  # after the lease: the handle is of this engine, not of one lost meanwhile
        generation = Generation(endpoint, body, uuid.uuid4().hex, target.asked, adapter)
        sample = self._shadows.sample(endpoint, body, target, turn.seats)
        try:
            answer = await held.enter_async_context(engine.generate(generation))
        except ServerError as error:
            self._count(endpoint, target, problems.status_of(error), Stats())
            await self._corrupted(error, target)
            raise
        held.push_async_callback(self._record, endpoint, target, answer, turn)
        if sample is not None:
            sample.follow(answer)
        return answer

    async def _turn(self, body: dict[str, Any], target: Target, held: AsyncExitStack) -> Turn:
        """Wait for this request's turn; meanwhile its adapter is loaded if there is room that nobody needs."""
        self._pool.running()  # nobody waits for an engine that is not there
        turn = self._turns.join(_line(target), _sequences(body))
        held.callback(self._turns.leave, turn)
        if turn.granted.done():
            waited_s = 0.0
        elif target.version is None or target.path is None:
            waited_s = await _seconds(turn.granted)
        else:
            with self._residency.expected(target.engine_name, target.path):
                waited_s = await _seconds(turn.granted)
            await asyncio.to_thread(self._resolver.resolve, target.version.ref)  # it may have been deleted meanwhile
        self._telemetry.waited(self._adapter(target), waited_s)
        return turn

    async def _record(self, endpoint: Endpoint, target: Target, answer: Answer, turn: Turn) -> None:
        turn.charge(answer.stats.prompt_tokens, answer.stats.generated_tokens)
        self._count(endpoint, target, answer.status, answer.stats)
        if answer.stats.corrupted:
            await self._corrupted(CorruptedOutput("NaN logits in a stream"), target)

    def _count(self, endpoint: Endpoint, target: Target, status: int, stats: Stats) -> None:
        self._telemetry.request(self._adapter(target), endpoint, status, stats)

    def _adapter(self, target: Target) -> str:
        return target.version.adapter if target.version else self._resolver.base_name

    async def _corrupted(self, error: ServerError, target: Target) -> None:
        """NaN logits: the adapter is taken out of service before it can answer again."""
        if not isinstance(error, CorruptedOutput):
            return
        log.error("corrupted output", extra={"model": target.asked})
        if target.version is not None:
            await self._lifecycle.quarantine(target.version, "its logits were NaN while serving")


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


async def read_json(request: Request, max_bytes: int) -> dict[str, Any]:
    """The body as a JSON object. Raises BadRequest, also for one that is too large, before it is read whole."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise BadRequest(f"content-type is {kind!r}, expected application/json", code="unsupported_media_type")
    received = await _read(request, max_bytes)
    try:
        text = received.decode()
        body = json.loads(text)
        if "\\u" in text:
            json.dumps(body, ensure_ascii=False).encode()  # half a surrogate pair is JSON, but no text
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the body is not JSON in UTF-8: {error}", code="invalid_json") from None
    if not isinstance(body, dict):
        raise BadRequest(f"the body is a JSON {type(body).__name__}, expected an object", code="invalid_json")
    return body


async def _read(request: Request, max_bytes: int) -> bytes:
    received = bytearray()
    try:
        async for chunk in request.stream():
            received += chunk
            if len(received) > max_bytes:
                raise RequestTooLarge(f"the body is larger than {max_bytes} bytes (max_request_bytes)")
    except ClientDisconnect:
        raise BadRequest("the client went away", code="client_disconnected") from None
    return bytes(received)


def _model_of(body: dict[str, Any]) -> str:
    asked = body.get("model")
    if asked is None:
        return ""
    if not isinstance(asked, str):
        raise BadRequest(f"model is a {type(asked).__name__}, expected a string", param="model")
    return asked


def _line(target: Target) -> Line:
    return BASE if target.version is None else target.engine_name


def _sequences(body: dict[str, Any]) -> int:
    """How many sequences the engine will decode for this body; the engine itself says what is wrong with it."""
    count, prompt = body.get("n"), body.get("prompt")
    prompts = len(prompt) if isinstance(prompt, list) and prompt and isinstance(prompt[0], (str, list)) else 1
    return prompts * (count if isinstance(count, int) and count > 0 else 1)


async def _seconds(waiting: Awaitable[Any]) -> float:
    started = time.perf_counter()
    await waiting
    return time.perf_counter() - started


def _headers(target: Target) -> dict[str, str]:
    if target.version is None:
        return {"x-loraplex-path": "base"}
    return {
        "x-loraplex-path": "lora",
        "x-loraplex-adapter": target.version.adapter,
        "x-loraplex-version": str(target.version.number),
    }


async def _until_disconnect(request: Request, work: Callable[[], Awaitable[Result]]) -> Result:
    """Run `work`, but cancel it when the client goes away first. The body has been read: all that can come is that."""
    task = asyncio.ensure_future(work())
    watcher = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait([task, watcher], return_when=asyncio.FIRST_COMPLETED)
    finally:
        watcher.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait([task])
    if task.cancelled():
        raise BadRequest("the client went away", code="client_disconnected")
    return task.result()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
