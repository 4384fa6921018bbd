"""Brings a version's files to this machine when they are only in the object store, before the engine needs them.

One fetch a version, which outlives whoever asked for it first; on threads of its own, so that a slow bucket delays
nobody whose adapter is here.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from adapters.store import Store
from server.resolve import Target

AT_ONCE = 4


class Fetches:
    def __init__(self, store: Store) -> None:
        self._store = store
        self._threads = ThreadPoolExecutor(AT_ONCE, "fetch")
        self._running: dict[str, asyncio.Future[Path]] = {}

    async def at_hand(self, target: Target) -> Target:
        """The same with its path. Raises StoreError when the files are gone, damaged or cannot be fetched."""
        if target.version is None or target.path is not None:
            return target
        return replace(target, path=await self.path(target.version.digest))

    async def path(self, digest: str) -> Path:
        fetch = self._running.get(digest)
        if fetch is None:
            fetch = asyncio.get_running_loop().run_in_executor(self._threads, self._store.path, digest)
            self._running[digest] = fetch
            fetch.add_done_callback(lambda done: self._ended(digest, done))
        return await asyncio.shield(fetch)

    def close(self) -> None:
        """What still runs ends by itself; nobody waits for it."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _ended(self, digest: str, fetch: asyncio.Future[Path]) -> None:
        del self._running[digest]
        if not fetch.cancelled():
            fetch.exception()  # seen: every waiter may have gone away meanwhile
