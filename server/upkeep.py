"""FLOW upkeep of a running server: collect garbage through the draining deletion, and verify every stored file.

One verification at a time, on a thread of its own: it reads everything, and no request may wait behind it.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

from adapters.collect import Collected, chosen
from adapters.errors import NotFound, StoreError
from adapters.ingest import Ingest
from adapters.registry import Registry
from adapters.retention import Judgement
from adapters.store import Store
from adapters.verify import Report, verify
from server.lifecycle import Lifecycle
from server.residency import Residency


class Upkeep:
    def __init__(
        self, store: Store, registry: Registry, ingest: Ingest, residency: Residency, lifecycle: Lifecycle
    ) -> None:
        self._store = store
        self._registry = registry
        self._ingest = ingest
        self._residency = residency
        self._lifecycle = lifecycle
        self._reader = ThreadPoolExecutor(1, "verify")
        self._closed = False

    async def collect(
        self, keep: int | None, *, name: str | None = None, dry_run: bool = False, wait_s: float = 30.0
    ) -> tuple[Collected, bool]:
        """What went, or would; and whether all of it is gone, for a deletion may take longer than `wait_s`."""
        judged: list[Judgement] = []
        tasks: list[asyncio.Task[None]] = []
        for each in await asyncio.to_thread(chosen, self._registry, name):
            with suppress(NotFound):  # gone meanwhile
                found, going = await self._lifecycle.retire(each, keep, dry_run=dry_run)
                judged += found
                tasks += going
        pending: set[asyncio.Task[None]] = set()
        if tasks:
            ended, pending = await asyncio.wait(tasks, timeout=wait_s)
            for task in ended:
                task.result()  # a deletion that failed is an answer, too
        sweep = partial(self._ingest.sweep, keep=self._held(), dry_run=dry_run)
        return Collected(tuple(judged), tuple(await asyncio.to_thread(sweep)), dry_run), not pending

    async def verify(self, *, repair: bool = False) -> Report:
        work = partial(
            verify, self._store, self._registry, repair=repair, keep=self._held(), progress=self._unless_closed
        )
        return await asyncio.get_running_loop().run_in_executor(self._reader, work)

    def close(self) -> None:
        self._closed = True
        self._reader.shutdown(wait=False, cancel_futures=True)

    def _unless_closed(self, *_: object) -> None:
        if self._closed:
            raise StoreError("the server stops; verify again when it is up", code="stopping")

    def _held(self) -> set[str]:
        """Digests that the engine may read again, although another machine has deleted their versions."""
        return {f"sha256:{Path(entry.handle.path).name}" for entry in self._residency.snapshot().values()}
