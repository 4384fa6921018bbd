"""FLOW out of service: an adapter version is drained, freed and deleted, or quarantined. Never under a request.

Runs as background tasks that outlive the request that asked; what a crash interrupts, `resume` finishes.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any

from adapters.errors import NotFound
from adapters.ingest import Ingest
from adapters.records import DRAINING, MERGE_ONLY, QUARANTINED, READY
from adapters.registry import Registry, Version
from adapters.retention import Judgement
from server.engine.merged import MergedEngines
from server.residency import Residency
from server.resolve import engine_name
from server.running import Running

log = logging.getLogger(__name__)


class Lifecycle:
    """`keep_versions`: how many of the newest stay when another comes; None: all."""

    def __init__(
        self,
        registry: Registry,
        ingest: Ingest,
        residency: Residency,
        running: Running,
        merged: MergedEngines,
        keep_versions: int | None = None,
    ) -> None:
        self._registry = registry
        self._ingest = ingest
        self._residency = residency
        self._running = running
        self._merged = merged
        self._keep_versions = keep_versions
        self._tasks: dict[str, asyncio.Task[None]] = {}
        """What is under way, by its action and version: `delete a@3`."""

    async def delete(self, version: Version) -> asyncio.Task[None]:
        """Refuse new requests from now on; the returned task ends when files and aliases are gone."""
        await asyncio.to_thread(self._registry.set_state, version.adapter, version.number, DRAINING)
        return self._start(f"delete {version.ref}", self._drain_and_forget(version))

    async def remove(self, name: str, number: int | None = None) -> list[tuple[Version, asyncio.Task[None]]]:
        """As `delete`, of a version that no alias serves, or of the whole adapter. A crash leaves no half of it."""
        going = await asyncio.to_thread(self._registry.drain, name, number)
        return [(each, self._start(f"delete {each.ref}", self._drain_and_forget(each))) for each in going]

    async def retire(
        self, name: str, keep: int | None, *, dry_run: bool = False
    ) -> tuple[list[Judgement], list[asyncio.Task[None]]]:
        """Judge every version of an adapter, and begin to delete those that may go. See `adapters.retention`."""
        used = self._residency.in_use() | self._merged.snapshot().keys()
        judged = await asyncio.to_thread(
            self._registry.retire, name, keep, lambda version: engine_name(version) in used, dry_run=dry_run
        )
        going = [] if dry_run else [each.version for each in judged if each.goes]
        return judged, [self._start(f"delete {version.ref}", self._drain_and_forget(version)) for version in going]

    def trim(self, name: str) -> None:
        """In the background, after an upload: versions beyond `keep_versions` go."""
        if self._keep_versions is not None:
            self._start(f"trim {name}", self._trim(name, self._keep_versions))

    async def cut(self, version: Version) -> int:
        """Of a version that is being deleted, end the requests that use it now; returns how many."""
        await asyncio.sleep(0)  # its deletion has begun: whoever comes now hears that it is being removed
        found = self._running.cut(engine_name(version))
        if found:
            log.warning("requests cut off", extra={"adapter": version.ref, "requests": found})
        return found

    async def quarantine(self, version: Version, reason: str) -> None:
        """Take a version out of service, keep its files for whoever must find out why. No effect on a draining one."""
        mark = self._registry.set_state
        served = MERGE_ONLY if version.state == MERGE_ONLY else READY
        if await asyncio.to_thread(mark, version.adapter, version.number, QUARANTINED, reason, only_from=served):
            log.error("adapter quarantined", extra={"adapter": version.ref, "reason": reason})
            self._start(f"free {version.ref}", self._free(version))

    async def resume(self) -> None:
        """Finish the deletions that a stop or a crash interrupted."""
        for version in await asyncio.to_thread(self._registry.draining):
            self._start(f"delete {version.ref}", self._drain_and_forget(version))

    async def close(self) -> None:
        """Abandon what is still draining; `resume` takes it up at the next start."""
        for task in list(self._tasks.values()):
            task.cancel()
        if self._tasks:
            await asyncio.wait(list(self._tasks.values()))

    def _start(self, action: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        if (running := self._tasks.get(action)) is not None:
            work.close()
            return running
        task = self._tasks[action] = asyncio.create_task(work)
        task.add_done_callback(lambda done: self._ended(action, done))
        return task

    def _ended(self, action: str, task: asyncio.Task[None]) -> None:
        self._tasks.pop(action, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("taking an adapter out of service failed", exc_info=error, extra={"action": action})

    async def _drain_and_forget(self, version: Version) -> None:
        await self._merged.demote(engine_name(version))
        async with self._residency.retiring(engine_name(version)):
            await asyncio.to_thread(self._ingest.forget, version.adapter, version.number, with_aliases=True)
        log.info("adapter deleted", extra={"adapter": version.ref})

    async def _trim(self, name: str, keep: int) -> None:
        with suppress(NotFound):  # deleted meanwhile
            judged, _ = await self.retire(name, keep)
            if gone := [each.version.ref for each in judged if each.goes]:
                log.info("older versions go", extra={"adapter": name, "versions": gone})

    async def _free(self, version: Version) -> None:
        await self._merged.demote(engine_name(version))
        async with self._residency.retiring(engine_name(version)):
            pass
