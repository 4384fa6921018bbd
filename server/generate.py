"""FLOW request: resolve → fetch → turn → lease → generate → answer. Turn and lease outlast the engine's work, always.

The flow of `Generator.answer` is the whole story; `LeasedStream` carries it on when the answer is streamed. Where a
merged engine dies under a request, the base engine answers it, or tells the rest of its stream.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from adapters.errors import AdapterError
from server import problems
from server.continuation import DONE, ERROR, Again, Splice, Told, rest_of
from server.engine.protocol import Answer, Endpoint, Generation, Stats
from server.errors import BadRequest, CorruptedOutput, EngineUnavailable, ServerError
from server.leased_stream import LeasedStream
from server.lifecycle import Lifecycle
from server.request_body import read_json
from server.resolve import Resolver, Target
from server.running import Running, Use
from server.shadow import Shadows
from server.telemetry import Telemetry
from server.traffic import Traffic
from server.ways import Place, Way, Ways, line_of

log = logging.getLogger(__name__)
Result = TypeVar("Result")

TIMED_TOKENS = 4
"""Of a shorter answer the time from token to token says little."""


@dataclass
class Ask:
    """One request on its way, and what came of it so far."""

    endpoint: Endpoint
    body: dict[str, Any]
    target: Target
    attempt: AsyncExitStack
    """What the place where it runs has lent it."""
    way: Way = "base"
    """The one that it took last."""
    stats: list[Stats] = field(default_factory=list)
    """Of every engine that worked on it."""

    @property
    def seats(self) -> int:
        return _sequences(self.body)


class Generator:
    """Answers generation requests; one for the whole server."""

    def __init__(
        self,
        ways: Ways,
        resolver: Resolver,
        running: Running,
        lifecycle: Lifecycle,
        shadows: Shadows,
        telemetry: Telemetry,
        traffic: Traffic,
        max_request_bytes: int,
    ) -> None:
        self._ways = ways
        self._resolver = resolver
        self._running = running
        self._lifecycle = lifecycle
        self._shadows = shadows
        self._telemetry = telemetry
        self._traffic = traffic
        self._max_request_bytes = max_request_bytes

    async def answer(self, endpoint: Endpoint, request: Request, key: str | None = None) -> Response:
        """One HTTP request in, one response out. A client that leaves takes its generation with it.

        `key`: the id of the caller's API key; where the body has no `user`, it is whose request this is.
        """
        body = await read_json(request, self._max_request_bytes)
        user = body.get("user")
        sticky = user if isinstance(user, str) and user else key
        target = await self._resolver.find(_model_of(body), sticky)
        async with AsyncExitStack() as held:  # out here: what `_begin` took is given back also where nobody hears of it
            use = held.enter_context(self._running.entered(line_of(target)))
            answer, way = await _until_disconnect(request, lambda: self._begin(use, endpoint, body, target, held))
            if answer.events is None:
                return JSONResponse(answer.body, answer.status, _headers(target, way))
            return LeasedStream(use, answer.events, held.pop_all(), _headers(target, way))

    async def _begin(
        self, use: Use, endpoint: Endpoint, body: dict[str, Any], target: Target, held: AsyncExitStack
    ) -> tuple[Answer, Way]:
        with use:
            return await self._answer(endpoint, body, target, held)

    async def _answer(
        self, endpoint: Endpoint, body: dict[str, Any], target: Target, held: AsyncExitStack
    ) -> tuple[Answer, Way]:
        """The whole answer, or one whose events are still to come; `held` has what must be given back behind it."""
        ask = Ask(endpoint, body, target, await held.enter_async_context(AsyncExitStack()))
        place = await self._ways.shortest(target, ask.seats, held, ask.attempt)
        sample = self._shadows.sample(endpoint, body, target, place.turn.seats)
        try:
            answer, place = await self._ask_somewhere(ask, place)
        except ServerError as error:
            self._count(ask, problems.status_of(error))
            await self._corrupted(error, target)
            raise
        held.push_async_callback(self._record, ask, answer.status)
        if place.way == "merged" and answer.events is not None:
            answer.events = self._to_its_end(ask, place, answer.events)
        if sample is not None:
            sample.follow(answer)
        return answer, place.way

    async def _ask_somewhere(self, ask: Ask, place: Place) -> tuple[Answer, Place]:
        """At this place; where that is a merged engine which dies before anything was said, through the base engine."""
        try:
            return await self._ask(ask, place, ask.endpoint, ask.body), place
        except EngineUnavailable:
            if place.way != "merged":
                raise
        place = await self._leave_for_base(ask)
        answer = await self._ask(ask, place, ask.endpoint, ask.body)
        self._telemetry.rescued(self._adapter(ask.target), "again")
        return answer, place

    async def _ask(self, ask: Ask, place: Place, endpoint: Endpoint, body: Mapping[str, Any]) -> Answer:
        generation = Generation(endpoint, body, uuid.uuid4().hex, ask.target.asked, place.adapter)
        answer = await ask.attempt.enter_async_context(place.engine.generate(generation))
        if answer.status >= 500 and place.way == "merged":
            await place.engine.check_health()
        ask.stats.append(answer.stats)
        ask.way = place.way
        ask.attempt.callback(lambda: place.turn.charge(answer.stats.prompt_tokens, answer.stats.generated_tokens))
        return answer

    async def _leave_for_base(self, ask: Ask) -> Place:
        log.warning("a merged engine was lost under a request", extra={"model": ask.target.asked})
        await ask.attempt.aclose()
        ask.stats.clear()
        return await self._ways.through_base(ask.target, ask.seats, ask.attempt)

    async def _to_its_end(self, ask: Ask, place: Place, events: AsyncIterator[str]) -> AsyncIterator[str]:
        """The events of a merged engine; if it dies in the middle of them, the base engine tells the rest."""
        told = Told()
        async for event in events:
            if event.startswith(ERROR) and await _has_died(place):
                break
            told.add(event)
            yield event
        else:
            return
        try:
            async for event in self._rest(ask, told.read()):
                yield event
        except (ServerError, AdapterError) as error:
            self._telemetry.rescued(self._adapter(ask.target), "failed")
            yield problems.event(problems.status_of(error), error.message, code=error.code)
            yield DONE

    async def _rest(self, ask: Ask, told: Told) -> AsyncIterator[str]:
        (before,) = ask.stats
        place = await self._leave_for_base(ask)
        if told.is_nothing:
            answer = await self._ask(ask, place, ask.endpoint, ask.body)
            splice: Again | Splice = Again(told)
        else:
            length = place.engine.info.max_model_len
            rest = rest_of(ask.endpoint, ask.body, told, before, length, place.engine.decode)
            answer = await self._ask(ask, place, "completions", rest.body)
            ask.stats.append(Stats(prompt_tokens=-rest.kept_tokens, generated_tokens=rest.kept_tokens))
            splice = Splice(ask.endpoint, told, rest)
        if answer.events is None:
            raise EngineUnavailable(f"the rest of the answer was refused: {answer.body}")
        self._telemetry.rescued(self._adapter(ask.target), "again" if told.is_nothing else "continued")
        async for event in answer.events:
            for each in splice.events(event):
                yield each

    async def _record(self, ask: Ask, status: int) -> None:
        self._count(ask, status)
        self._note(ask)
        if any(stats.corrupted for stats in ask.stats):
            await self._corrupted(CorruptedOutput("NaN logits in a stream"), ask.target)

    def _count(self, ask: Ask, status: int) -> None:
        self._telemetry.request(self._adapter(ask.target), ask.endpoint, status, Stats.total(ask.stats))

    def _note(self, ask: Ask) -> None:
        """Who was asked, and how fast that way was: of one answer by one engine, long enough to be timed."""
        total, version = Stats.total(ask.stats), ask.target.version
        tpot_s = None
        if len(ask.stats) == 1 and ask.seats == 1 and total.generated_tokens >= TIMED_TOKENS:
            tpot_s = ask.stats[0].decode_s / (total.generated_tokens - 1) or None  # 0: it was not told to its end
        self._traffic.ended(
            None if version is None else version.ref,
            ask.way,
            tokens=total.prompt_tokens + total.generated_tokens,
            ttft_s=total.ttft_s,
            tpot_s=tpot_s,
            load=self._running.count,
        )

    def _adapter(self, target: Target) -> str:
        return target.version.adapter if target.version else self._resolver.base_name

    async def _corrupted(self, error: ServerError, target: Target) -> None:
        """NaN logits: the adapter is taken out of service before it can answer again."""
        if not isinstance(error, CorruptedOutput):
            return
        log.error("corrupted output", extra={"model": target.asked})
        if target.version is not None:
            await self._lifecycle.quarantine(target.version, "its logits were NaN while serving")


async def _has_died(place: Place) -> bool:
    try:
        await place.engine.check_health()
    except EngineUnavailable:
        return True
    return False


def _model_of(body: dict[str, Any]) -> str:
    asked = body.get("model")
    if asked is None:
        return ""
    if not isinstance(asked, str):
        raise BadRequest(f"model is a {type(asked).__name__}, expected a string", param="model")
    return asked


def _sequences(body: dict[str, Any]) -> int:
    """How many sequences the engine will decode for this body; the engine itself says what is wrong with it."""
    count, prompt = body.get("n"), body.get("prompt")
    prompts = len(prompt) if isinstance(prompt, list) and prompt and isinstance(prompt[0], (str, list)) else 1
    return prompts * (count if isinstance(count, int) and count > 0 else 1)


def _headers(target: Target, way: Way) -> dict[str, str]:
    named: dict[str, str] = {"x-loraplex-path": way}
    if target.version is not None:
        named |= {"x-loraplex-adapter": target.version.adapter, "x-loraplex-version": str(target.version.number)}
    return named


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
