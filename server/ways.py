"""Where a request runs: in the merged engine of its version where one is ready, else in the base engine, with a lease.

Every version has the way through the base engine as well, but those that no engine can swap (`merge_only`). What is
taken here, turns and leases, is given back by whoever closes the stack that it was put into.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable
from contextlib import AsyncExitStack, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

from adapters.records import MERGE_ONLY
from server.engine.merged import MergedEngine, MergedEngines
from server.engine.pool import EnginePool
from server.engine.protocol import AdapterHandle, Engine
from server.errors import EngineUnavailable
from server.fairness import BASE, Line, Turn, Turns
from server.fetches import Fetches
from server.residency import Residency
from server.resolve import Resolver, Target
from server.telemetry import Telemetry

Way = Literal["base", "lora", "merged"]
"""As the header `x-loraplex-path` says it."""


@dataclass(frozen=True)
class Place:
    """Where one request may run now."""

    way: Way
    engine: Engine
    adapter: AdapterHandle | None
    turn: Turn


class Ways:
    def __init__(
        self,
        pool: EnginePool,
        merged: MergedEngines,
        resolver: Resolver,
        fetches: Fetches,
        turns: Turns,
        residency: Residency,
        telemetry: Telemetry,
    ) -> None:
        self._pool = pool
        self._merged = merged
        self._resolver = resolver
        self._fetches = fetches
        self._turns = turns
        self._residency = residency
        self._telemetry = telemetry

    async def shortest(self, target: Target, seats: int, held: AsyncExitStack, attempt: AsyncExitStack) -> Place:
        """`held` gets what lasts as long as the request, `attempt` what lasts as long as it runs at this place.

        A lease of a merged engine lasts as long as the request also where it does not end there, so that its version
        is not removed in between.
        """
        merged = None if target.version is None else self._merged.find(target.engine_name)
        if merged is not None and merged.state == "ready":
            try:
                return await self._through_merged(merged, target, seats, held, attempt)
            except EngineUnavailable:  # lost while the request stood in its line
                await attempt.aclose()
        return await self.through_base(target, seats, attempt)

    async def through_base(self, target: Target, seats: int, attempt: AsyncExitStack) -> Place:
        """The way that every version has. Raises EngineUnavailable for one that is merge only."""
        if target.version is not None and target.version.state == MERGE_ONLY:
            merged = self._merged.find(target.engine_name)
            state = f"is {merged.state}" if merged else "is gone"
            raise EngineUnavailable(
                f"adapter {target.version.ref} can be served only merged, and its engine {state}; try again shortly"
            )
        target = await self._fetches.at_hand(target)
        self._pool.running()  # nobody waits for an engine that is not there
        turn = self._join(self._turns, line_of(target), seats, attempt)
        if target.version is None or target.path is None:
            await self._wait(turn, target)
            return Place("base", self._pool.running(), None, turn)
        expected = self._residency.expected(target.engine_name, target.path)
        with nullcontext() if turn.granted.done() else expected:  # loaded meanwhile if nobody needs the room
            await self._wait(turn, target)
        adapter = await attempt.enter_async_context(self._residency.lease(target.engine_name, target.path))
        # The engine after the lease: the handle is of this one, not of one lost meanwhile.
        return Place("lora", self._pool.running(), adapter, turn)

    async def _through_merged(
        self, merged: MergedEngine, target: Target, seats: int, held: AsyncExitStack, attempt: AsyncExitStack
    ) -> Place:
        held.enter_context(merged.lease())
        turn = self._join(merged.turns, BASE, seats, attempt)
        await self._wait(turn, target)
        return Place("merged", merged.pool.running(), None, turn)

    def _join(self, turns: Turns, line: Line, seats: int, attempt: AsyncExitStack) -> Turn:
        turn = turns.join(line, seats)
        attempt.callback(turns.leave, turn)
        return turn

    async def _wait(self, turn: Turn, target: Target) -> None:
        waited_s = 0.0
        if not turn.granted.done():
            waited_s = await _seconds(turn.granted)
            if target.version is not None:
                await self._resolver.find(target.version.ref)  # deleted meanwhile?
        self._telemetry.waited(target.version.adapter if target.version else self._resolver.base_name, waited_s)


def line_of(target: Target) -> Line:
    return BASE if target.version is None else target.engine_name


async def _seconds(waiting: Awaitable[Any]) -> float:
    started = time.perf_counter()
    await waiting
    return time.perf_counter() - started
