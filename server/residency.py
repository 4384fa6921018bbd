"""Which adapters the engine holds right now: loaded once, leased while used, least recently used idle ones go.

Rules (ENGINE facts in the README say why): only this module hands the engine a path; every load has a fresh id;
nothing is removed while leased; a load happens in the spare place first and evicts afterwards, so that an adapter
the engine refuses never pushes out a good one; a load outlives the cancellation of whoever asked for it first.
Knows no registry and no HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from server.engine.protocol import AdapterHandle, Engine
from server.errors import AdapterUnavailable, EngineUnavailable, Overloaded, ServerError

log = logging.getLogger(__name__)

State = Literal["resident", "evicting", "draining"]


@dataclass
class Resident:
    """One adapter version that the engine holds."""

    handle: AdapterHandle
    load_s: float
    state: State = "resident"
    leases: int = 0
    last_used: float = field(default_factory=time.monotonic)
    since: float = field(default_factory=time.time)


@dataclass
class Counters:
    """Since the server started."""

    loads: int = 0
    hits: int = 0
    evictions: int = 0
    failures: int = 0


class Residency:
    """`engine` gives the running engine or raises EngineUnavailable. `capacity`: adapters that stay resident; the
    engine must hold one more. `wait_s`: how long a lease may wait for room."""

    def __init__(self, engine: Callable[[], Engine], capacity: int, wait_s: float) -> None:
        self._engine = engine
        self._capacity = capacity
        self._wait_s = wait_s
        self._entries: dict[str, Resident] = {}
        self._loads: dict[str, asyncio.Task[None]] = {}
        self._wanted: Counter[str] = Counter()
        self._expected: Counter[str] = Counter()
        self._prefetches: set[asyncio.Task[None]] = set()
        self._retiring: Counter[str] = Counter()
        self._ids = itertools.count(1)
        self._epoch = 0
        self._one_load = asyncio.Lock()
        self._changed = asyncio.Condition()
        self.counters = Counters()

    @asynccontextmanager
    async def lease(self, name: str, path: Path) -> AsyncIterator[AdapterHandle]:
        """Hold `name` in the engine while the block runs. Loads it from `path` if needed.

        Raises Overloaded when no room came in time, AdapterUnavailable when the engine refuses the adapter or it is
        on its way out, EngineUnavailable when there is no engine.
        """
        self._wanted[name] += 1
        try:
            entry = await self._acquire(name, path)
        except BaseException:
            _decrement(self._wanted, name)
            await asyncio.shield(self._notify())  # it may be idle now, and others wait for room
            raise
        _decrement(self._wanted, name)
        try:
            yield entry.handle
        finally:
            await asyncio.shield(self._release(entry))

    @contextmanager
    def expected(self, name: str, path: Path) -> Iterator[None]:
        """A request for `name` stands in line while the block runs: load it now if that costs nobody anything, and
        rather evict another adapter than this one."""
        self._expected[name] += 1
        try:
            if self._has_spare_room(name):
                task = asyncio.create_task(self._prefetch(name, path))
                self._prefetches.add(task)  # kept: the loop holds tasks weakly
                task.add_done_callback(self._prefetches.discard)
            yield
        finally:
            _decrement(self._expected, name)

    def has_room_for(self, name: str) -> bool:
        """Whether a lease of `name` would cost nobody anything: it is here, or evicts no one who is expected."""
        return name in self._entries or self._has_spare_room(name)

    def _has_spare_room(self, name: str) -> bool:
        """Whether a load of `name` would be news, wait for nothing, and evict nobody who is expected."""
        if name in self._entries or name in self._loads or name in self._retiring or self._one_load.locked():
            return False
        return len(self._entries) < self._capacity or any(idle not in self._expected for idle in self._idle())

    async def _prefetch(self, name: str, path: Path) -> None:
        with contextlib.suppress(ServerError):  # whoever leases it tries again, and hears why
            await self._load_shared(name, path, asyncio.get_running_loop().time() + self._wait_s)

    @asynccontextmanager
    async def retiring(self, name: str) -> AsyncIterator[None]:
        """Refuse new leases, wait for those that run, free the adapter; the block then runs with it gone."""
        self._retiring[name] += 1
        try:
            if (load := self._loads.get(name)) is not None:
                await asyncio.wait([load])
            await self._drain(name)
            yield
        finally:
            _decrement(self._retiring, name)

    def forget_all(self) -> None:
        """The engine was lost and everything in it. Leases still held end by themselves."""
        self._epoch += 1
        self._entries.clear()
        self._waking = asyncio.create_task(self._notify())  # there is room now (kept: the loop holds tasks weakly)

    def snapshot(self) -> dict[str, Resident]:
        """Engine name → what is held right now."""
        return dict(self._entries)

    def loading(self) -> list[str]:
        return list(self._loads)

    def in_use(self) -> set[str]:
        """What requests hold, load or wait for."""
        return {name for name, held in self._entries.items() if held.leases}.union(
            self._loads, self._wanted, self._expected
        )

    @property
    def capacity(self) -> int:
        return self._capacity

    async def _acquire(self, name: str, path: Path) -> Resident:
        loop, found = asyncio.get_running_loop(), True
        deadline = loop.time() + self._wait_s
        while True:
            if name in self._retiring:
                raise AdapterUnavailable(f"adapter {name} is being removed", code="adapter_draining")
            entry = self._entries.get(name)
            if entry is None:
                found = False
                try:
                    await self._load_shared(name, path, deadline)
                except Overloaded:
                    if loop.time() >= deadline:  # else the patience of whoever asked first ran out, not ours
                        raise
            elif entry.state == "resident":
                self.counters.hits += found
                entry.leases += 1
                entry.last_used = time.monotonic()
                return entry
            else:
                await self._gone(name, entry)

    async def _gone(self, name: str, entry: Resident) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: self._entries.get(name) is not entry)

    async def _load_shared(self, name: str, path: Path, deadline: float) -> None:
        task = self._loads.get(name)
        if task is None or task.done():  # done, but not yet cleared: awaiting it would never yield to the clearing
            task = self._loads[name] = asyncio.create_task(self._load(name, path, deadline))
            task.add_done_callback(lambda done: self._load_ended(name, done))
        await asyncio.shield(task)

    def _load_ended(self, name: str, task: asyncio.Task[None]) -> None:
        if self._loads.get(name) is task:
            del self._loads[name]
        if not task.cancelled():
            task.exception()  # seen: every waiter may have gone away meanwhile

    async def _load(self, name: str, path: Path, deadline: float) -> None:
        try:
            async with asyncio.timeout_at(deadline):
                await self._one_load.acquire()
        except TimeoutError:
            raise self._overloaded(name) from None
        try:
            await self._make_room(name, deadline)
            await self._load_into_spare_place(name, path)
            await self._evict_idle()
        finally:
            self._one_load.release()

    async def _make_room(self, name: str, deadline: float) -> None:
        """Until one place more than the capacity is free. Only idle adapters give way."""
        try:
            async with asyncio.timeout_at(deadline), self._changed:
                await self._changed.wait_for(lambda: len(self._entries) <= self._capacity or self._idle())
        except TimeoutError:
            raise self._overloaded(name) from None
        await self._evict_idle()

    async def _load_into_spare_place(self, name: str, path: Path) -> None:
        handle, started = AdapterHandle(name, str(path), next(self._ids)), time.perf_counter()
        try:
            await asyncio.to_thread(_read_through, path)
            engine, epoch = self._engine(), self._epoch  # together: after a loss meanwhile, both are the new one's
            await engine.add_adapter(handle)
        except ServerError:
            raise
        except Exception as error:
            self.counters.failures += 1
            log.warning("engine refused adapter", extra={"adapter": name, "reason": str(error)})
            reason = _first_line(error).replace(str(path), "its directory")  # clients need not know our disk
            message = f"the engine refused adapter {name}: {reason}"
            raise AdapterUnavailable(message, code="adapter_refused") from error
        if epoch != self._epoch:
            raise EngineUnavailable("the engine was rebuilt while the adapter was loading; try again")
        self.counters.loads += 1
        self._entries[name] = entry = Resident(handle, load_s=time.perf_counter() - started)
        log.info("adapter loaded", extra={"adapter": name, "load_s": round(entry.load_s, 4)})

    async def _evict_idle(self) -> None:
        while len(self._entries) > self._capacity and (idle := self._idle()):
            oldest = min(idle, key=lambda name: (name in self._expected, self._entries[name].last_used))
            self.counters.evictions += 1
            await self._remove(oldest, "evicting")

    def _idle(self) -> list[str]:
        return [
            name
            for name, entry in self._entries.items()
            if entry.leases == 0 and entry.state == "resident" and name not in self._wanted
        ]

    async def _drain(self, name: str) -> None:
        entry = self._entries.get(name)
        if entry is None:
            return
        entry.state = "draining"
        async with self._changed:
            await self._changed.wait_for(lambda: entry.leases == 0 or self._entries.get(name) is not entry)
        if self._entries.get(name) is entry:
            await self._remove(name, "draining")

    async def _remove(self, name: str, state: State) -> None:
        entry = self._entries[name]
        entry.state = state
        try:
            await self._engine().remove_adapter(entry.handle)
        except EngineUnavailable:
            log.info("engine is gone, and the adapter with it", extra={"adapter": name})
        finally:
            if self._entries.get(name) is entry:
                del self._entries[name]
            await self._notify()

    async def _release(self, entry: Resident) -> None:
        entry.leases -= 1
        entry.last_used = time.monotonic()
        await self._notify()

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    def _overloaded(self, name: str) -> Overloaded:
        return Overloaded(
            f"no room for adapter {name} within {self._wait_s:g} s: all {self._capacity} resident adapters are in "
            "use; retry later or raise max_resident_adapters"
        )


def _decrement(counter: Counter[str], name: str) -> None:
    counter[name] -= 1
    if not counter[name]:
        del counter[name]


def _read_through(path: Path) -> None:
    """Bring the files into the page cache, so that the engine's own read between two steps never waits for a disk."""
    for file in path.iterdir():
        with file.open("rb") as stream:
            while stream.read(1 << 20):
                pass


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
