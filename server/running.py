"""Requests that use an adapter now, by its engine name, so that a forced deletion can cut them off.

A request is cut where it waits for something, by cancelling that wait; what it hears is AdapterUnavailable. One that is
stuck with its client (`send` does not return) is cancelled as a whole, a moment later. Knows no HTTP and no engine.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from server.errors import AdapterUnavailable

GRACE_S = 2.0
"""How long one that has been cut may take to say so to its client."""


class Use:
    """One request. What it waits for stands in a `with` block of it, which raises AdapterUnavailable when it is cut;
    whoever streams makes that whole `stoppable`."""

    def __init__(self, name: str | None, has_client: bool) -> None:
        self.name = name
        self.has_client = has_client
        self.is_cut = False
        self._waiting: asyncio.Task[object] | None = None
        self._cancelled_before = 0
        self._whole: asyncio.Task[object] | None = None

    def cut(self) -> None:
        self.is_cut = True
        if self._waiting is not None:
            self._waiting.cancel()
        asyncio.get_running_loop().call_later(GRACE_S, self._stop)

    def __enter__(self) -> None:
        if self.is_cut:
            raise self._deleted()
        self._waiting = _current()
        self._cancelled_before = self._waiting.cancelling()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        waited, self._waiting = self._waiting, None
        assert waited is not None
        if kind is asyncio.CancelledError and self._is_mine(waited, self._cancelled_before):
            raise self._deleted() from None
        # else it ended by itself, or the client left as well

    @contextmanager
    def stoppable(self) -> Iterator[None]:
        """The block just ends when it is stuck after a cut."""
        task = self._whole = _current()
        before = task.cancelling()
        try:
            yield
        except asyncio.CancelledError:
            if not self._is_mine(task, before):
                raise
        finally:
            self._whole = None

    def _is_mine(self, task: asyncio.Task[object], before: int) -> bool:
        """Whether the cancellation of this task is the cut, and no other's."""
        return self.is_cut and task.uncancel() <= before

    def _stop(self) -> None:
        if self._whole is not None:
            self._whole.cancel()

    def _deleted(self) -> AdapterUnavailable:
        return AdapterUnavailable(f"adapter {self.name} was deleted while it answered", code="adapter_deleted")


class Running:
    def __init__(self) -> None:
        self._uses: dict[str | None, set[Use]] = {}
        self.count = 0
        """Of all together."""

    @contextmanager
    def entered(self, name: str | None, *, has_client: bool = True) -> Iterator[Use]:
        """None: the base model, which nobody cuts."""
        use = Use(name, has_client)
        self._uses.setdefault(name, set()).add(use)
        self.count += 1
        try:
            yield use
        finally:
            self.count -= 1
            self._uses[name].discard(use)
            if not self._uses[name]:
                del self._uses[name]

    def cut(self, name: str) -> int:
        """All that use it now; returns how many clients are told."""
        uses = [use for use in self._uses.get(name, ()) if not use.is_cut]
        for use in uses:
            use.cut()
        return sum(use.has_client for use in uses)


def _current() -> asyncio.Task[object]:
    task = asyncio.current_task()
    assert task is not None
    return task
