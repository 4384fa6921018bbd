"""Keeps one engine alive: starts it, proves that it generates, watches it, rebuilds it when it dies.

The API process stays up throughout; `running()` raises EngineUnavailable while there is nothing to run on.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Literal

from server.engine.protocol import Engine, Generation
from server.errors import EngineUnavailable

log = logging.getLogger(__name__)

PoolState = Literal["starting", "ready", "restarting", "failed", "stopped"]
WATCH_S = 0.5
FIRST_RETRY_S, LONGEST_RETRY_S = 1.0, 60.0
SHORT_LIFE_S = 60.0
"""An engine that died sooner counts as one that did not start, where somebody counts."""


class EnginePool:
    """`build` makes a fresh, unstarted engine. `on_loss` is called whenever a running engine was lost. `proof`: what a
    started one must do before it is ready. `most_failures`: after so many in a row it stays as it is; None: never."""

    def __init__(
        self,
        build: Callable[[], Engine],
        on_loss: Callable[[], None] = lambda: None,
        *,
        proof: Callable[[Engine], Awaitable[None]] | None = None,
        most_failures: int | None = None,
    ) -> None:
        self._build = build
        self._on_loss = on_loss
        self._proof = proof or prove
        self._most_failures = most_failures
        self._engine: Engine | None = None
        self._task: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self.state: PoolState = "starting"
        self.reason: str | None = None
        self.restarts = 0
        self.has_given_up = False
        self.never_started = True
        self.on_first_failure: Callable[[], None] | None = None
        """Called instead of retrying when the very first start fails: then it is the configuration, not bad luck."""

    def running(self) -> Engine:
        if self.state != "ready" or self._engine is None:
            detail = f" ({self.reason})" if self.reason else ""
            raise EngineUnavailable(f"the engine is {self.state}{detail}; try again shortly")
        return self._engine

    @property
    def is_open(self) -> bool:
        return self._task is not None

    def open(self) -> None:
        """Begin starting the engine in the background."""
        self._task = asyncio.create_task(self._supervise())

    async def ready(self) -> Engine:
        """Wait for the engine; raises EngineUnavailable if its first start fails."""
        while self.state not in ("ready", "failed", "stopped"):
            self._changed.clear()
            await self._changed.wait()
        return self.running()

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        self._become("stopped")
        await self._discard()

    async def _supervise(self) -> None:
        retry_s, failures = FIRST_RETRY_S, 0
        while True:
            if await self._start():
                self.never_started = False
                retry_s, began = FIRST_RETRY_S, time.monotonic()
                await self._watch()
                self._on_loss()
                self.restarts += 1
                failures = failures + 1 if time.monotonic() - began < SHORT_LIFE_S else 0
            else:
                failures += 1
            await self._discard()
            if self.never_started and self.on_first_failure is not None:
                self.on_first_failure()
                return
            if failures == self._most_failures:
                self.has_given_up = True
                self._become("failed", f"{failures} times in a row it did not start or died at once")
                return
            await asyncio.sleep(retry_s)
            retry_s = min(2 * retry_s, LONGEST_RETRY_S)

    async def _start(self) -> bool:
        started = time.perf_counter()
        try:
            self._engine = self._build()
            await self._engine.start()
            await self._proof(self._engine)
        except Exception as error:
            log.exception("engine did not start")
            self._become("failed", str(error).splitlines()[0] if str(error) else type(error).__name__)
            return False
        self._become("ready")
        log.info("engine ready", extra={"start_s": round(time.perf_counter() - started, 2)})
        return True

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(WATCH_S)
            try:
                await self.running().check_health()
            except EngineUnavailable as error:
                log.error("engine lost; rebuilding it", extra={"reason": error.message})
                self._become("restarting", "the engine process died")
                return

    async def _discard(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            try:
                await engine.stop()
            except Exception:
                log.exception("engine did not stop cleanly")

    def _become(self, state: PoolState, reason: str | None = None) -> None:
        self.state, self.reason = state, reason
        self._changed.set()


async def prove(engine: Engine) -> None:
    """Generate one token: an engine is ready only when it can."""
    body = {"prompt": "Hello", "max_tokens": 1, "temperature": 0}
    async with engine.generate(Generation("completions", body, "readiness", engine.info.model_name, None)) as answer:
        if answer.status != 200:
            raise EngineUnavailable(f"the engine started, but could not generate: {answer.body}")
