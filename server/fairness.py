"""Whose turn is it: which waiting requests may go to the engine now, so that no adapter starves another.

The engine takes requests in the order of their arrival, and a batch mixes at most `slots` adapters: a steady stream
for some of them keeps all others out for as long as it lasts. So no queue may form in the engine. Requests wait here,
a line for each adapter and one for the base model, and no more are let in than the engine can run together.

Who is next: the line that has received the least service, counted in tokens (the virtual token counter of Sheng et
al., "Fairness in Serving Large Language Models", OSDI 2024); within a line, first come, first served. A line that
comes back after a pause starts at the level of the others, so that nobody saves up for a flood.

A line of which nothing runs may go beyond the seats by a few, so that a newcomer need not wait for an answer of a
flood to end.

Slots: an adapter keeps its slot for as long as requests of it run. Where others wait for a slot and have received
less, it lets nobody new in once it has had the slot for `turn_s`, finishes what runs, and hands it over. So a wait is
bounded by `turn_s` and the longest running answer, and slots change hands no more often than that. Nothing waits while
there is a seat and a slot for it.

A polite request (`ask`) takes only what nobody wants: it is let in where no one waits and there is a seat and a slot,
it gives both back as soon as anyone has to wait, and its tokens count for nothing.

A line is any string. Knows no engine, no HTTP, no residency; all of it runs in one event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from server.errors import Overloaded

PROMPT_TOKEN, GENERATED_TOKEN = 1.0, 2.0
"""What a token costs (the weights of the paper)."""

Line = str | None
BASE: Line = None
"""The line of the base model, which needs no slot."""


@dataclass(eq=False)
class Turn:
    """One request: standing in line, then running. `charge` it with what it cost before it leaves."""

    line: Line
    seats: int
    since_s: float
    granted: asyncio.Future[None]
    """Done when it is this request's turn."""
    expected_cost: float = 0.0
    cost: float = 0.0
    yield_now: Callable[[], object] | None = None
    """Of a polite one: called when somebody has to wait."""

    def charge(self, prompt_tokens: int, generated_tokens: int) -> None:
        self.cost = PROMPT_TOKEN * prompt_tokens + GENERATED_TOKEN * generated_tokens


@dataclass
class Service:
    """What a line has received, holds and waits for."""

    counter: float = 0.0
    """Tokens served, by their cost; of running requests what is expected of them."""
    typical_cost: float = 1.0
    running: int = 0
    waiting: deque[Turn] = field(default_factory=deque)
    slot_since_s: float | None = None

    @property
    def active(self) -> bool:
        return bool(self.running or self.waiting)


class Turns:
    """`slots`: adapters that may run at once. `seats`: sequences that may. `turn_s`: how long a slot is kept at least.

    `max_waiting`: how many requests may wait, here and with `others`. `newcomers`: sequences beyond the seats, for
    lines of which none runs.
    """

    def __init__(
        self,
        slots: int,
        seats: int,
        turn_s: float,
        max_waiting: int,
        newcomers: int = 0,
        clock: Callable[[], float] = time.monotonic,
        others: Callable[[], int] = lambda: 0,
    ) -> None:
        self._slots = slots
        self._seats = seats
        self._newcomers = newcomers
        self._turn_s = turn_s
        self._max_waiting = max_waiting
        self._clock = clock
        self._others = others
        self._lines: dict[Line, Service] = {}
        self._taken = 0
        self._polite: list[Turn] = []
        self._someone_left = asyncio.Event()
        self.waiting = 0

    def join(self, line: Line, seats: int = 1) -> Turn:
        """Stand in line for so many sequences; await `granted`, and call `leave` whatever happens then.

        Raises Overloaded when too many wait already.
        """
        if (waiting := self.waiting + self._others()) >= self._max_waiting:
            raise Overloaded(f"{waiting} requests are waiting already (max_waiting_requests); retry later")
        if line not in self._lines:
            self._lines[line] = Service()
        service = self._lines[line]
        if not service.active:
            service.counter = max(service.counter, self._lowest_counter())
        turn = Turn(line, min(max(1, seats), self._seats), self._clock(), asyncio.get_running_loop().create_future())
        service.waiting.append(turn)
        self.waiting += 1
        self._let_in()
        return turn

    def ask(self, line: Line, seats: int, yield_now: Callable[[], object]) -> Turn | None:
        """A turn that is granted already, or None where there is no room that nobody wants. `leave` it as any other.

        `yield_now` is called when someone has to wait; who was let in then ends soon.
        """
        service = self._lines.get(line) or Service(self._lowest_counter())
        if self.waiting or self._taken + seats > self._seats or not self._has_slot(line, service):
            return None
        self._lines[line] = service
        turn = Turn(line, seats, self._clock(), asyncio.get_running_loop().create_future(), yield_now=yield_now)
        turn.granted.set_result(None)
        service.running += 1
        if service.slot_since_s is None:
            service.slot_since_s = self._clock()
        self._taken += seats
        self._polite.append(turn)
        return turn

    def leave(self, turn: Turn) -> None:
        """Of a request that has ended, or that gave up waiting."""
        service = self._lines[turn.line]
        if turn in service.waiting:
            service.waiting.remove(turn)
            self.waiting -= 1
        else:
            service.running -= 1
            self._taken -= turn.seats
            if turn in self._polite:
                self._polite.remove(turn)
            else:
                service.counter += turn.cost - turn.expected_cost
                service.typical_cost += 0.2 * (turn.cost - service.typical_cost)
            if not service.running:
                service.slot_since_s = None
        self._let_in()
        self._forget_idle()
        left, self._someone_left = self._someone_left, asyncio.Event()
        left.set()

    async def someone_left(self) -> None:
        """Wait until there may be more room than now."""
        await self._someone_left.wait()

    def waiting_by_line(self) -> dict[Line, int]:
        """Only the lines in which someone waits."""
        return {line: len(service.waiting) for line, service in self._lines.items() if service.waiting}

    def _let_in(self) -> None:
        while (turn := self._next()) is not None:
            self._grant(turn)
        if self.waiting:
            for polite in self._polite:
                if polite.yield_now is not None:
                    polite.yield_now()
                    polite.yield_now = None  # once is enough

    def _next(self) -> Turn | None:
        """The first of the line that has received least, if there is a seat for it; else a newcomer.

        A request for many sequences holds back all others until there are so many seats: else it would never run.
        """
        leaving = self._leaving()
        heads = sorted(
            (
                (service.counter, service.waiting[0].since_s, service)
                for line, service in self._lines.items()
                if service.waiting and line not in leaving and self._has_slot(line, service)
            ),
            key=lambda head: head[:2],
        )
        for place, (_, _, service) in enumerate(heads):
            turn = service.waiting[0]
            newcomers = 0 if service.running else self._newcomers
            if self._taken + turn.seats <= self._seats + newcomers and (place == 0 or newcomers):
                return turn
        return None

    def _grant(self, turn: Turn) -> None:
        service = self._lines[turn.line]
        service.waiting.popleft()
        self.waiting -= 1
        service.running += 1
        if service.slot_since_s is None:
            service.slot_since_s = self._clock()
        turn.expected_cost = service.typical_cost
        service.counter += turn.expected_cost
        self._taken += turn.seats
        if not turn.granted.done():  # else cancelled, and about to leave
            turn.granted.set_result(None)

    def _has_slot(self, line: Line, service: Service) -> bool:
        return line is BASE or service.slot_since_s is not None or len(self._holders()) < self._slots

    def _holders(self) -> list[Line]:
        return [line for line, each in self._lines.items() if line is not BASE and each.slot_since_s is not None]

    def _leaving(self) -> set[Line]:
        """Who must let nobody new in, so that a slot becomes free: as many lines as wait for one, the most served."""
        holders = self._holders()
        outside = [
            service.counter
            for line, service in self._lines.items()
            if service.waiting and line is not BASE and service.slot_since_s is None
        ]
        if not outside or len(holders) < self._slots:
            return set()
        long_enough = self._clock() - self._turn_s
        due = [
            (service.counter, line)
            for line in holders
            if (service := self._lines[line]).counter >= min(outside)
            and service.slot_since_s is not None
            and service.slot_since_s <= long_enough
        ]
        due.sort(key=lambda each: -each[0])
        return {line for _, line in due[: len(outside)]}

    def _lowest_counter(self) -> float:
        return min((service.counter for service in self._lines.values() if service.active), default=0.0)

    def _forget_idle(self) -> None:
        """Lines without requests whose counter says nothing any more: `join` would raise it to the others' level."""
        lowest = self._lowest_counter()
        active = any(service.active for service in self._lines.values())
        for line in [line for line, each in self._lines.items() if not each.active]:
            if not active or self._lines[line].counter <= lowest:
                del self._lines[line]
