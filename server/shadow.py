"""Shadow traffic: some of the requests that an alias answers are asked again of another version, and compared.

    sample → (the client has its answer) → queue, bounded → a turn that nobody wants → the same request → compare → drop

A shadow never delays an answer: it begins when that is complete, waits until nobody else does, gives way as soon as
someone must wait, evicts no adapter that somebody expects, and is dropped where its time never comes. Its tokens count
for no one. What was found is kept in memory, without any text; see `shadow_tally.py`.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

from adapters.errors import AdapterError
from adapters.records import Shadow
from adapters.registry import Registry
from server.engine.pool import EnginePool
from server.engine.protocol import Answer, Endpoint, Generation
from server.errors import CorruptedOutput, ServerError
from server.fairness import Turn, Turns
from server.fetches import Fetches
from server.lifecycle import Lifecycle
from server.residency import Residency
from server.resolve import Resolver, Target
from server.running import Running
from server.shadow_tally import Said, Tally, read_body, read_events
from server.telemetry import Telemetry

log = logging.getLogger(__name__)

PENDING = 16
PATIENCE_S = 30.0
"""How long one waits for its turn."""
REFRESH_S = 1.0
"""How old our knowledge of who has a shadow may be: another process may change it."""
MOST_CHARACTERS = 262_144
"""Of a prompt, and of an answer, that is kept for comparing."""
MOST_TALLIES = 1000

Key = tuple[str, str]
"""Adapter and alias."""


class Dropped(Exception):
    """It was not asked; the reason."""


@dataclass
class Sample:
    """One request of an alias: `follow` its answer, and it is asked again later."""

    shadows: Shadows
    key: Key
    shadow: Shadow
    endpoint: Endpoint
    body: Mapping[str, Any]
    asked: str
    seats: int
    began: float
    said: Callable[[], Said | None] = lambda: None
    """Reads what the client got; None where that was no whole answer."""
    preempted: bool = False

    def follow(self, answer: Answer) -> None:
        if answer.events is not None:
            answer.events = self._listen(answer, answer.events)
        elif answer.status == 200 and answer.body is not None:
            self._offer(partial(read_body, answer.body, answer.stats.ttft_s, self._elapsed_s()))

    async def _listen(self, answer: Answer, events: AsyncIterator[str]) -> AsyncIterator[str]:
        """The client's own events, as they come. A client that leaves never reaches the end, and nothing is asked."""
        heard: list[str] = []
        characters = 0
        async for event in events:
            characters += len(event)
            if characters <= 4 * MOST_CHARACTERS:  # the frame of an event is longer than what it says
                heard.append(event)
            yield event
        self._offer(partial(read_events, heard, answer.stats.ttft_s, self._elapsed_s()))

    def _offer(self, said: Callable[[], Said | None]) -> None:
        self.said = said
        self.shadows.offer(self)

    def _elapsed_s(self) -> float:
        return time.perf_counter() - self.began


class Shadows:
    def __init__(
        self,
        registry: Registry,
        pool: EnginePool,
        resolver: Resolver,
        fetches: Fetches,
        turns: Turns,
        residency: Residency,
        running: Running,
        lifecycle: Lifecycle,
        telemetry: Telemetry,
    ) -> None:
        self._registry = registry
        self._pool = pool
        self._resolver = resolver
        self._fetches = fetches
        self._turns = turns
        self._residency = residency
        self._running = running
        self._lifecycle = lifecycle
        self._telemetry = telemetry
        self._known: Mapping[Key, Shadow] = {}
        self._known_since = float("-inf")
        self._tallies: dict[Key, Tally] = {}
        self._pending: deque[Sample] = deque()
        self._worker: asyncio.Task[None] | None = None
        self._reading: asyncio.Task[None] | None = None

    def sample(self, endpoint: Endpoint, body: Mapping[str, Any], target: Target, seats: int) -> Sample | None:
        """None for nearly every request: its alias has no shadow, or the dice fell otherwise. Costs no query."""
        if target.version is None or target.alias is None:
            return None
        if time.monotonic() - self._known_since > REFRESH_S and (self._reading is None or self._reading.done()):
            self._reading = asyncio.create_task(self._refresh())
        key = (target.version.adapter, target.alias)
        shadow = self._known.get(key)
        if shadow is None or shadow.number == target.version.number or secrets.randbelow(100) >= shadow.percent:
            return None
        if len(str(body.get("messages") or body.get("prompt"))) > MOST_CHARACTERS:
            self._drop(key, shadow, "too_long")
            return None
        return Sample(self, key, shadow, endpoint, body, target.asked, seats, time.perf_counter())

    async def reload(self) -> None:
        """Read anew who has a shadow."""
        self._known_since = time.monotonic()
        self._known = await asyncio.to_thread(self._registry.shadows)

    async def _refresh(self) -> None:
        try:
            await self.reload()
        except Exception:
            log.exception("who has a shadow cannot be read; what was known stays")

    def tally(self, key: Key, shadow: Shadow) -> Tally:
        """What is known of this shadow; nothing yet of one that was set anew."""
        found = self._tallies.pop(key, None)
        if found is None or found.number != shadow.number:
            found = Tally(shadow.number)
        self._tallies[key] = found  # the last that was asked for is the last to go
        while len(self._tallies) > MOST_TALLIES:
            del self._tallies[next(iter(self._tallies))]
        return found

    def offer(self, sample: Sample) -> None:
        if len(self._pending) >= PENDING:
            self._drop(sample.key, sample.shadow, "queue_full")
            return
        self._pending.append(sample)
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())

    async def close(self) -> None:
        """What is pending is not asked any more."""
        self._pending.clear()
        tasks = [task for task in (self._worker, self._reading) if task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _work(self) -> None:
        while self._pending:
            await self._settle(self._pending.popleft())

    async def _settle(self, sample: Sample) -> None:
        def yield_now() -> None:
            sample.preempted = True
            asking.cancel()

        asking = asyncio.create_task(self._ask(sample, yield_now))
        try:
            await asking
        except asyncio.CancelledError:
            if not sample.preempted:
                raise
            self._drop(sample.key, sample.shadow, "preempted")
        except Dropped as dropped:
            self._drop(sample.key, sample.shadow, str(dropped))
        except (ServerError, AdapterError) as error:
            self._fail(sample, error.code)
        except Exception:
            log.exception("a shadow request failed", extra={"adapter": sample.key[0]})
            self._fail(sample, "internal_error")

    async def _ask(self, sample: Sample, yield_now: Callable[[], object]) -> None:
        """The same request again, of the shadow."""
        said = await asyncio.to_thread(sample.said)
        if said is None:
            return
        ref = f"{sample.key[0]}@{sample.shadow.number}"
        target = await self._fetches.at_hand(await self._resolver.find(ref))
        assert target.path is not None
        async with AsyncExitStack() as held:
            use = held.enter_context(self._running.entered(target.engine_name, has_client=False))
            with use:
                turn = await self._turn(target.engine_name, sample.seats, yield_now)
                held.callback(self._turns.leave, turn)
                lease = self._residency.lease(target.engine_name, target.path)
                adapter = await held.enter_async_context(lease)
                body = {key: value for key, value in sample.body.items() if key not in ("stream", "stream_options")}
                generation = Generation(sample.endpoint, body, f"shadow-{uuid.uuid4().hex}", sample.asked, adapter)
                began = time.perf_counter()
                try:
                    answer = await held.enter_async_context(self._pool.running().generate(generation))
                except CorruptedOutput:
                    assert target.version is not None
                    await self._lifecycle.quarantine(target.version, "its logits were NaN in shadow traffic")
                    raise
            self._compare(sample, said, answer, time.perf_counter() - began)

    async def _turn(self, line: str, seats: int, yield_now: Callable[[], object]) -> Turn:
        """One that nobody wants, in an engine that need not load or evict for it."""
        try:
            async with asyncio.timeout(PATIENCE_S):
                while True:
                    turn = self._turns.ask(line, seats, yield_now) if self._residency.has_room_for(line) else None
                    if turn is not None:
                        return turn
                    await self._turns.someone_left()
        except TimeoutError:
            raise Dropped("no_room") from None

    def _compare(self, sample: Sample, said: Said, answer: Answer, total_s: float) -> None:
        if answer.status != 200 or answer.body is None:
            error = (answer.body or {}).get("error") or {}
            self._fail(sample, str(error.get("code") or f"status_{answer.status}")[:64])
            return
        shadowed = read_body(answer.body, answer.stats.ttft_s, total_s)
        agrees = self.tally(sample.key, sample.shadow).add(sample.body, said, shadowed)
        self._telemetry.shadowed(sample.key[0], "agreed" if agrees else "differed")

    def _fail(self, sample: Sample, code: str) -> None:
        self.tally(sample.key, sample.shadow).errors[code] += 1
        self._telemetry.shadowed(sample.key[0], "failed")

    def _drop(self, key: Key, shadow: Shadow, reason: str) -> None:
        self.tally(key, shadow).dropped[reason] += 1
        self._telemetry.shadowed(key[0], "dropped")
