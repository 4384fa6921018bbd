"""FLOW in: files through the gate, then tried by the engine, then ready; the alias moves last.

A version whose trial a stop, a crash or a dead engine interrupts stays in `checking`, and is tried again. Trials are
tasks that outlive the client; one runs at a time.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import replace

from adapters.errors import InvalidAdapter, NotFound
from adapters.ingest import Ingest
from adapters.records import CHECKING, FAILED
from adapters.refusals import refuse
from adapters.registry import Registry, Version
from adapters.upload import UploadedFile, UploadOptions
from server.errors import EngineUnavailable, Overloaded
from server.fetches import Fetches
from server.lifecycle import Lifecycle
from server.probe import Probe
from server.resolve import engine_name

log = logging.getLogger(__name__)

WAIT_S = 60.0
"""How long an upload waits for the trial before it answers that the version is still checked."""
MOST_ATTEMPTS = 3
"""Trials that ended with the engine's death, or ours. One of those adapters may be the reason."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0


class Admission:
    """`probe`: None takes whatever passes the gate."""

    def __init__(
        self, registry: Registry, ingest: Ingest, fetches: Fetches, lifecycle: Lifecycle, probe: Probe | None
    ) -> None:
        self._registry = registry
        self._ingest = ingest
        self._fetches = fetches
        self._lifecycle = lifecycle
        self._probe = probe
        self._trials: dict[str, asyncio.Task[None]] = {}
        self._one_trial = asyncio.Lock()

    async def upload(
        self, name: str, files: Sequence[UploadedFile], options: UploadOptions, wait_s: float | None = None
    ) -> tuple[Version, bool]:
        """The version, and whether it is new. It may still be in `checking` when `wait_s` is over.

        What the engine does not take is refused, and leaves nothing, while somebody waits to hear it; later it stays,
        `failed`, for whoever looks.
        """
        options = replace(options, probe=self.tries)
        version, created = await asyncio.to_thread(self._ingest.upload, name, files, options)
        return await self.settled(version, created, wait_s), created

    @property
    def tries(self) -> bool:
        """Whether a version must pass a trial before it serves."""
        return self._probe is not None

    async def settled(self, version: Version, created: bool, wait_s: float | None = None) -> Version:
        """The version as its trial leaves it. Raises InvalidAdapter where that refuses it."""
        if version.state != CHECKING or self._probe is None:
            self._lifecycle.trim(version.adapter)
            return version
        deadline = time.monotonic() + (WAIT_S if wait_s is None else wait_s)
        for _ in range(2):  # the first may be the end of an earlier trial, which this upload came too late for
            await asyncio.wait([self._start(version)], timeout=max(0.0, deadline - time.monotonic()))
            found = await asyncio.to_thread(self._registry.resolve, version.adapter, str(version.number))
            if found.state != CHECKING:
                break
        if found.state != FAILED:
            return found
        if created:
            await asyncio.to_thread(self._ingest.forget, found.adapter, found.number, with_aliases=True)
        raise refuse("probe_failed", str(found.reason).removesuffix("."))

    async def resume(self) -> None:
        """Try what was uploaded and never tried; where nothing is tried any more, let it serve."""
        for version in await asyncio.to_thread(self._registry.checking):
            if self._probe is not None:
                self._start(version)
            else:
                await asyncio.to_thread(self._registry.admit, version, {})

    async def close(self) -> None:
        for task in list(self._trials.values()):
            task.cancel()
        if self._trials:
            await asyncio.wait(list(self._trials.values()))

    def _start(self, version: Version) -> asyncio.Task[None]:
        task = self._trials.get(version.ref)
        if task is None:
            task = self._trials[version.ref] = asyncio.create_task(self._try(version))
            task.add_done_callback(lambda done: self._ended(version, done))
        return task

    def _ended(self, version: Version, task: asyncio.Task[None]) -> None:
        self._trials.pop(version.ref, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("trying an adapter failed", exc_info=error, extra={"adapter": version.ref})

    async def _try(self, version: Version) -> None:
        assert self._probe is not None
        pause_s = FIRST_PAUSE_S
        while True:
            try:
                await self._attempt(self._probe, version)
            except (EngineUnavailable, Overloaded) as error:
                log.info("an adapter is tried again later", extra={"adapter": version.ref, "reason": error.message})
            except NotFound:
                return  # deleted meanwhile
            else:
                return
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    async def _attempt(self, probe: Probe, version: Version) -> None:
        path = await self._fetches.path(version.digest)
        async with self._one_trial:
            await probe.ready()
            attempts = await asyncio.to_thread(self._registry.count_attempt, version)
            if attempts > MOST_ATTEMPTS:
                reason = f"{MOST_ATTEMPTS} times it was tried, and each time the engine or the server ended"
                await asyncio.to_thread(self._registry.reject, version, reason)
                return
            try:
                findings = await probe.measure(engine_name(version), path)
            except Overloaded:
                await asyncio.to_thread(self._registry.count_attempt, version, -1)  # it was not tried
                raise
            except InvalidAdapter as error:
                log.warning("an adapter failed its trial", extra={"adapter": version.ref, "reason": error.message})
                await asyncio.to_thread(self._registry.reject, version, error.message)
            else:
                await asyncio.to_thread(self._registry.admit, version, findings)
                self._lifecycle.trim(version.adapter)
                log.info("adapter admitted", extra={"adapter": version.ref, "mean_change": findings["mean_change"]})
