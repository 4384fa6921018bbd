"""Engines that serve one version each, its adapter merged into the weights and LoRA off, beside the base engine.

    building → warming → ready → draining → gone          ready → rebuilding → warming → ready, or failed

Each is supervised like the base engine (pool.py); whoever holds a lease of one is waited for before it is stopped. One
is built at a time, when the base engine is up and the plan says that it fits, so each sees what the others have left.
A build outlives the cancellation of whoever asked for it; `demote` ends it. Nothing is remembered beyond the process.

Knows no registry, no adapters and no HTTP: names are those under which the base engine sees versions.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from server.engine.memory_plan import MemoryPlan
from server.engine.pool import EnginePool, prove
from server.engine.protocol import Engine, Generation
from server.errors import EngineUnavailable, MergedEngineRefused
from server.fairness import Turns

log = logging.getLogger(__name__)

State = Literal["waiting", "building", "warming", "ready", "rebuilding", "failed", "draining"]
MOST_FAILURES = 3
WARMING_WORDS = (8, 64, 400)
"""Lengths of prompts, as far as the model takes them; each is asked twice at once, so that kernels for one row, for few
and for many are compiled."""
WATCH_S = 0.1


class MergedEngine:
    """One version's engine: what it is made of, where it is in its life, and who waits for it."""

    def __init__(self, name: str, directory: Path, plan: MemoryPlan, pool: EnginePool, turns: Turns) -> None:
        self.name = name
        self.directory = directory
        self.plan = plan
        self.pool = pool
        self.turns = turns
        self.since: float | None = None
        """Unix time at which it became ready first."""
        self.build_s: float | None = None
        self.leases = 0
        self.is_warming = False
        self.build: asyncio.Task[None] | None = None
        self.end: asyncio.Task[None] | None = None
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def state(self) -> State:
        if self.end is not None:
            return "draining"
        if self.pool.state == "ready":
            return "ready"
        if self.pool.has_given_up:
            return "failed"
        if self.is_warming:
            return "warming"
        if not self.pool.never_started:
            return "rebuilding"
        return "building" if self.pool.is_open else "waiting"

    @contextmanager
    def lease(self) -> Iterator[None]:
        """It is not stopped while the block runs. Raises EngineUnavailable unless it is ready."""
        if self.state != "ready":
            raise EngineUnavailable(f"the merged engine of {self.name} is {self.state}; try again shortly")
        self.leases += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.leases -= 1
            if not self.leases:
                self._idle.set()

    async def idle(self) -> None:
        await self._idle.wait()


class MergedEngines:
    """`make` gives a fresh, unstarted engine for a name and a directory, `plan` its memory, `free` how much of it
    there is and `reserve` what must stay; `line_up` makes turns for one engine; at most `most` engines."""

    def __init__(
        self,
        base: EnginePool,
        make: Callable[[str, Path], Engine],
        plan: Callable[[Path], MemoryPlan],
        free: Callable[[], int],
        line_up: Callable[[], Turns],
        *,
        most: int,
        reserve: int,
    ) -> None:
        self._base = base
        self._make = make
        self._plan = plan
        self._free = free
        self._line_up = line_up
        self._most = most
        self._reserve = reserve
        self._entries: dict[str, MergedEngine] = {}
        self._one_build = asyncio.Lock()
        self.restarts = 0
        self.on_gone: Callable[[], None] = lambda: None
        """Called when one is gone: its weights are not needed any more."""

    def find(self, name: str) -> MergedEngine | None:
        """In any state."""
        return self._entries.get(name)

    def serves(self, name: str) -> bool:
        """Whether there is one, or will be: it is not on its way out."""
        entry = self._entries.get(name)
        return entry is not None and entry.state not in ("draining", "failed")

    def answers(self, name: str) -> bool:
        """Whether a request for `name` is answered by one now."""
        entry = self._entries.get(name)
        return entry is not None and entry.state == "ready"

    def snapshot(self) -> dict[str, MergedEngine]:
        return dict(self._entries)

    @property
    def waiting(self) -> int:
        """Requests that wait for their turn with one of them."""
        return sum(entry.turns.waiting for entry in self._entries.values())

    def require_room(self, name: str, plan: MemoryPlan) -> None:
        """Raises MergedEngineRefused where one for `name` could not be built now."""
        others = [other for other in self._entries if other != name]
        if len(others) >= self._most:
            held = f": {', '.join(others)}" if others else ""
            raise MergedEngineRefused(
                f"max_merged_engines is {self._most}, and there are {len(others)} already{held}; fall back from one of "
                "them first",
                code="too_many_merged_engines",
            )
        if name not in self._entries:
            plan.require(self._free(), self._reserve)

    async def promote(
        self, name: str, directory: Path, report: Callable[[State], None] = lambda _: None
    ) -> MergedEngine:
        """Build an engine of the merged weights in `directory`; requests for `name` go there when this returns.

        Nothing happens where that is so already; a build that is under way is joined. `report` is told every state,
        and often enough to stop the wait by raising. Raises MergedEngineRefused, or EngineUnavailable when it does not
        start or is demoted meanwhile; then nothing is left.
        """
        while (entry := self._entries.get(name)) is not None and entry.end is not None:
            await asyncio.shield(entry.end)
        if entry is not None and entry.state == "failed":
            await self.demote(name)
            entry = self._entries.get(name)
        if entry is None:
            entry = self._begin(name, directory)
        elif entry.directory != directory:
            raise MergedEngineRefused(f"{name} has an engine of other merged weights; fall back from it first")
        build = entry.build
        assert build is not None
        while not build.done():
            report(entry.state)
            await asyncio.wait([build], timeout=WATCH_S)
        build.result()
        report(entry.state)
        return entry

    async def demote(self, name: str) -> None:
        """New requests take the LoRA path from now on; returns when those that run there have ended and it is gone."""
        entry = self._entries.get(name)
        if entry is None:
            return
        if entry.end is None:
            entry.end = asyncio.create_task(self._end(entry))
        await asyncio.shield(entry.end)

    async def close(self) -> None:
        """Stop all of them; nobody is waited for."""
        entries = list(self._entries.values())
        tasks = [task for entry in entries for task in (entry.build, entry.end) if task is not None]
        for task in tasks:
            task.cancel()
        for entry in entries:
            await self._stop(entry)
        if tasks:
            await asyncio.wait(tasks)

    def _begin(self, name: str, directory: Path) -> MergedEngine:
        plan = self._plan(directory)
        self.require_room(name, plan)

        def build() -> Engine:
            plan.require(self._free(), self._reserve)  # at every rebuild: others may have taken the memory meanwhile
            return self._make(name, directory)

        async def proof(engine: Engine) -> None:
            entry.is_warming = True
            try:
                await warm(engine)
            finally:
                entry.is_warming = False

        pool = EnginePool(build, self._lost, proof=proof, most_failures=MOST_FAILURES)
        pool.on_first_failure = lambda: None  # it is not tried again: that is the weights, or the memory
        entry = self._entries[name] = MergedEngine(name, directory, plan, pool, self._line_up())
        entry.build = asyncio.create_task(self._build(entry))
        entry.build.add_done_callback(lambda done: done.cancelled() or done.exception())  # seen: nobody may be waiting
        return entry

    async def _build(self, entry: MergedEngine) -> None:
        try:
            async with self._one_build:
                await self._base.ready()
                if entry.end is not None:
                    raise EngineUnavailable(f"{entry.name} fell back before its engine was built")
                entry.plan.require(self._free(), self._reserve)
                started = time.perf_counter()
                entry.pool.open()
                await entry.pool.ready()
        except BaseException as error:
            reason = entry.pool.reason
            if entry.end is None:
                await self._stop(entry)
            if isinstance(error, EngineUnavailable):
                reason = reason or error.message
                message = f"the merged engine of {entry.name} did not start: {reason}"
                raise EngineUnavailable(message, code="merged_engine_failed") from error
            raise
        entry.since, entry.build_s = time.time(), time.perf_counter() - started
        log.info("merged engine ready", extra={"adapter": entry.name, "build_s": round(entry.build_s, 2)})

    async def _end(self, entry: MergedEngine) -> None:
        await entry.idle()
        await self._stop(entry)
        log.info("merged engine gone", extra={"adapter": entry.name})

    async def _stop(self, entry: MergedEngine) -> None:
        await entry.pool.close()
        if self._entries.get(entry.name) is entry:
            del self._entries[entry.name]
            self.on_gone()

    def _lost(self) -> None:
        self.restarts += 1


async def warm(engine: Engine) -> None:
    """It must generate; and whatever is compiled at the first steps of a kind is compiled now, not under a request."""
    await prove(engine)
    for words in WARMING_WORDS:
        fitting = min(words, engine.info.max_model_len // 4)
        await asyncio.gather(*(_ask(engine, fitting) for _ in range(2)))


async def _ask(engine: Engine, words: int) -> None:
    body = {"prompt": " ".join(["and"] * words), "max_tokens": 4, "temperature": 0, "ignore_eos": True}
    generation = Generation("completions", body, f"warming-{uuid.uuid4().hex}", engine.info.model_name, None)
    async with engine.generate(generation) as answer:
        if answer.stats.corrupted or answer.status >= 500:
            raise EngineUnavailable(f"it could not generate while it was warmed: {answer.body}")
