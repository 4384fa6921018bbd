"""Calls side by side that wait for each other: none goes on before all of them have come as far.

Each has a thread, because it has to stop in the midst of somebody else's code; only one of them runs at any time. It
knows no models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from threading import Semaphore, Thread, current_thread
from typing import Generic, TypeVar

Result = TypeVar("Result")


class Lane(Thread, Generic[Result]):
    """One call. It runs while whoever began it stands in `advance`."""

    def __init__(self, call: Callable[[], Result]) -> None:
        super().__init__(daemon=True)
        self.waits_for: object = None
        self.has_ended = False
        self._call = call
        self._found: list[Result] = []
        self._error: BaseException | None = None
        self._cancelled = False
        self._go, self._stopped = Semaphore(0), Semaphore(0)

    def run(self) -> None:
        self._go.acquire()
        try:
            if not self._cancelled:
                self._found.append(self._call())
        except BaseException as error:  # raised again where the result is asked for
            self._error = error
        finally:
            self.has_ended = True
            self._stopped.release()

    def advance(self) -> None:
        """To where it waits next, or to its end."""
        self._go.release()
        self._stopped.acquire()

    def wait_for(self, what: object) -> None:
        """Called from within."""
        self.waits_for = what
        self._stopped.release()
        self._go.acquire()
        if self._cancelled:
            raise _Cancelled

    def result(self) -> Result:
        if self._error is not None:
            raise self._error
        return self._found.pop()

    def cancel(self) -> None:
        self._cancelled = True
        while not self.has_ended:
            self.advance()
        self.join()


class _Cancelled(BaseException):
    """Unwinds a call that nobody wants any more."""


def current_lane() -> Lane[object] | None:
    """The one that asks."""
    thread = current_thread()
    return thread if isinstance(thread, Lane) else None


def side_by_side(calls: Sequence[Callable[[], Result]], ready: Callable[[object], None]) -> Iterator[Result]:
    """Their results, in order. `ready` is called with what the first of them waits for, when all of them wait."""
    lanes = [Lane(call) for call in calls]
    for lane in lanes:
        lane.start()
    try:
        waiting = list(lanes)
        while waiting:
            first = waiting[0].waits_for
            if first is not None:
                ready(first)
            for lane in [each for each in waiting if each.waits_for is first and not each.has_ended]:
                lane.advance()
                while waiting and waiting[0].has_ended:
                    yield waiting.pop(0).result()
    finally:
        for lane in lanes:
            lane.cancel()
