"""Whose turn it is: slots, seats, service by tokens, no starvation, nothing idle that could run."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.errors import Overloaded
from server.fairness import BASE, Line, Turn, Turns
from tests.server.harness import PATIENCE_S


@dataclass
class Clock:
    now_s: float = 0.0

    def __call__(self) -> float:
        return self.now_s


@dataclass
class Desk:
    """Turns with a clock that stands still until a test moves it."""

    slots: int = 1
    seats: int = 4
    turn_s: float = 2.0
    max_waiting: int = 100
    newcomers: int = 0
    clock: Clock = field(default_factory=Clock)

    def __post_init__(self) -> None:
        self.turns = Turns(self.slots, self.seats, self.turn_s, self.max_waiting, self.newcomers, self.clock)

    def join(self, line: Line, count: int = 1, seats: int = 1) -> list[Turn]:
        return [self.turns.join(line, seats) for _ in range(count)]

    def end(self, turn: Turn, generated: int = 10) -> None:
        turn.charge(0, generated)
        self.turns.leave(turn)


def running(turns: list[Turn]) -> int:
    return sum(turn.granted.done() for turn in turns)


async def test_what_fits_runs_at_once() -> None:
    desk = Desk(slots=2, seats=8)

    assert running([*desk.join("a", 2), *desk.join("b", 2), *desk.join(BASE, 2)]) == 6


async def test_no_more_sequences_run_than_there_are_seats_and_one_end_lets_one_in() -> None:
    desk = Desk(seats=2)
    first, second, third, fourth = desk.join("a", 4)
    assert [turn.granted.done() for turn in (first, second, third, fourth)] == [True, True, False, False]

    desk.end(first)

    assert [turn.granted.done() for turn in (third, fourth)] == [True, False]


async def test_a_newcomer_need_not_wait_for_a_seat_that_a_flood_holds() -> None:
    desk = Desk(slots=9, seats=4, newcomers=2)
    flood = desk.join("flood", 10)
    assert running(flood) == 4, "the places of newcomers are not for it"
    quiet = [turn for line in ("a", "b", "c") for turn in desk.join(line, 2)]
    assert [turn.granted.done() for turn in quiet] == [True, False, True, False, False, False]

    desk.end(quiet[0])

    assert quiet[4].granted.done()
    assert running(flood) == 4


async def test_no_more_adapters_run_than_there_are_slots_but_the_base_needs_none() -> None:
    desk = Desk(slots=2, seats=10)
    (a,), (b,), (c,) = desk.join("a"), desk.join("b"), desk.join("c")

    assert [turn.granted.done() for turn in (a, b, c)] == [True, True, False]
    assert running(desk.join(BASE)) == 1

    desk.end(a)

    assert c.granted.done()


async def test_a_flood_hands_its_slot_over_after_its_turn_and_then_goes_on() -> None:
    desk = Desk(slots=1, seats=4, turn_s=2.0)
    flood = desk.join("flood", 10)
    (quiet,) = desk.join("quiet")
    desk.end(flood[0])
    assert running(flood) == 5, "its turn has only begun"

    desk.clock.now_s = 2.0
    for turn in flood[1:5]:
        assert not quiet.granted.done()
        desk.end(turn)

    assert quiet.granted.done()
    assert running(flood) == 5, "nobody new was let in meanwhile"
    desk.end(quiet)
    assert running(flood) == 9


async def test_a_slot_is_kept_when_who_waited_for_it_gives_up() -> None:
    desk = Desk(slots=1, seats=4)
    flood = desk.join("flood", 4)
    (quiet,) = desk.join("quiet")
    desk.clock.now_s = 5.0
    more = desk.join("flood", 1)
    desk.end(flood[0])
    assert running(more) == 0

    desk.turns.leave(quiet)

    assert running(more) == 1


async def test_only_as_many_slots_are_handed_over_as_are_waited_for_and_the_most_served_goes() -> None:
    desk = Desk(slots=2, seats=20)
    small, large = desk.join("small", 1), desk.join("large", 1)
    desk.end(desk.join("large")[0], generated=1000)
    desk.clock.now_s = 5.0
    (newcomer,) = desk.join("new")

    assert running(desk.join("small")) == 1
    assert running(desk.join("large")) == 0
    assert not newcomer.granted.done()
    desk.end(large[0])
    assert newcomer.granted.done()
    assert running(small) == 1


async def test_two_floods_on_one_slot_get_the_same_service() -> None:
    desk = Desk(slots=1, seats=2, turn_s=1.0)
    live = desk.join("a", 2) + desk.join("b", 2)
    served: Counter[Line] = Counter()
    for _ in range(400):
        turn = next(turn for turn in live if turn.granted.done())
        live.remove(turn)
        served[turn.line] += 10 if turn.line == "a" else 30
        desk.end(turn, generated=10 if turn.line == "a" else 30)
        desk.clock.now_s += 0.25
        live += desk.join(turn.line)

    assert served["a"] == pytest.approx(served["b"], rel=0.1)


async def test_seats_go_to_the_line_that_was_served_least() -> None:
    desk = Desk(slots=4, seats=1)
    (first, *flood), quiet = desk.join("flood", 5), desk.join("quiet", 1)

    desk.end(first)

    assert running(quiet) == 1
    assert running(flood) == 0


async def test_a_pause_saves_up_nothing() -> None:
    desk = Desk(slots=4, seats=1)
    for _ in range(50):
        desk.end(desk.join("busy")[0], generated=100)
    busy = desk.join("busy", 20)
    late = desk.join("late", 20)  # has never been served, and is not owed fifty answers for it
    order = []
    for _ in range(20):
        turn = next(turn for turn in busy + late if turn.granted.done())
        (busy if turn in busy else late).remove(turn)
        order.append(turn.line)
        desk.end(turn, generated=100)

    assert Counter(order)["busy"] == pytest.approx(10, abs=1)


async def test_a_request_for_many_sequences_is_not_overtaken_for_ever() -> None:
    desk = Desk(slots=1, seats=4)
    small = desk.join("a", 4)
    (wide,) = desk.join("a", seats=4)
    later = desk.join("a", 2)

    desk.end(small[0])
    assert running(later) == 0
    for turn in small[1:]:
        desk.end(turn)

    assert wide.granted.done()
    assert running(later) == 0


async def test_a_request_wider_than_the_engine_runs_alone() -> None:
    assert running(Desk(seats=4).join("a", seats=100)) == 1


async def test_too_many_waiting_are_turned_away_and_change_nothing() -> None:
    desk = Desk(seats=1, max_waiting=1)
    (first,), (second,) = desk.join("a"), desk.join("a")

    with pytest.raises(Overloaded, match="1 requests are waiting already"):
        desk.join("b")

    desk.end(first)
    assert second.granted.done()
    assert desk.turns.waiting == 0


async def test_a_turn_cancelled_in_the_moment_it_is_granted_frees_its_place() -> None:
    desk = Desk(seats=1)
    (first,), (second,), (third,) = desk.join("a"), desk.join("a"), desk.join("a")
    second.granted.cancel()

    desk.end(first)
    desk.turns.leave(second)

    assert third.granted.done()


async def test_lines_nobody_uses_are_forgotten() -> None:
    desk = Desk(slots=4, seats=4)
    for number in range(100):
        desk.end(desk.join(f"adapter {number}")[0])

    assert desk.turns._lines == {}


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("join"), st.sampled_from([BASE, "a", "b", "c", "d"]), st.integers(1, 3)),
        st.tuples(st.just("end"), st.integers(0, 30), st.integers(0, 200)),
        st.tuples(st.just("give up"), st.integers(0, 30), st.just(0)),
        st.tuples(st.just("wait"), st.floats(0, 3), st.just(0)),
    ),
    max_size=60,
)


@given(actions=ACTIONS, slots=st.integers(1, 3), seats=st.integers(1, 5))
@settings(max_examples=200, deadline=None)
def test_whatever_happens_limits_hold_nothing_idles_and_everybody_is_served(
    actions: list[Any], slots: int, seats: int
) -> None:
    async def story() -> None:
        desk = Desk(slots, seats)
        live: list[Turn] = []
        for action, what, amount in actions:
            _act(desk, live, action, what, amount)
            _check(desk, live)
        for _ in itertools.takewhile(lambda _: live, range(1000)):  # let everything finish
            desk.clock.now_s += 0.5
            _act(desk, live, "end", 0, 10)
            _check(desk, live)
        assert live == []
        assert desk.turns._lines == {}

    asyncio.run(story())


def _act(desk: Desk, live: list[Turn], action: str, what: Any, amount: int) -> None:
    granted = [turn for turn in live if turn.granted.done()]
    waiting = [turn for turn in live if not turn.granted.done()]
    if action == "join":
        live += desk.join(what, seats=amount)
    elif action == "wait":
        desk.clock.now_s += what
    elif action == "end" and granted:
        live.remove(turn := granted[what % len(granted)])
        desk.end(turn, amount)
    elif action == "give up" and waiting:
        live.remove(turn := waiting[what % len(waiting)])
        desk.turns.leave(turn)


def _check(desk: Desk, live: list[Turn]) -> None:
    granted = [turn for turn in live if turn.granted.done()]
    waiting = [turn for turn in live if not turn.granted.done()]
    adapters = {turn.line for turn in granted if turn.line is not BASE}
    assert sum(turn.seats for turn in granted) <= desk.seats
    assert len(adapters) <= desk.slots
    assert desk.turns.waiting == len(waiting)
    for turn in waiting:  # first come, first served within a line
        assert all(other.since_s <= turn.since_s for other in granted if other.line == turn.line)
    assert granted or not waiting, "nothing runs, and somebody waits"
    if len(adapters) < desk.slots and waiting:  # a free slot: only seats can be missing
        assert sum(turn.seats for turn in granted) + max(turn.seats for turn in waiting) > desk.seats


async def test_a_polite_request_takes_only_what_nobody_wants() -> None:
    turns, asked = Turns(slots=1, seats=2, turn_s=1, max_waiting=9), []
    first = turns.join("a")
    assert turns.ask("b", 1, lambda: None) is None  # no slot
    assert turns.ask("a", 2, lambda: None) is None  # no seat
    polite = turns.ask("a", 1, lambda: asked.append(polite))
    assert polite is not None
    assert polite.granted.done()
    assert turns.ask("a", 1, lambda: None) is None
    second = turns.join("a")
    third = turns.join("a")
    assert asked == [polite]  # once, though two wait
    assert not second.granted.done()
    turns.leave(polite)
    assert (second.granted.done(), third.granted.done()) == (True, False)
    assert turns.ask("a", 1, lambda: None) is None  # someone waits
    for turn in (first, second, third):
        turns.leave(turn)
    assert turns._taken == 0


async def test_a_polite_request_counts_for_nothing() -> None:
    turns = Turns(slots=1, seats=3, turn_s=1, max_waiting=9)
    running = turns.join("a")
    service = turns._lines["a"]
    before = (service.counter, service.typical_cost)
    polite = turns.ask("a", 1, lambda: None)
    assert polite is not None
    assert (service.running, service.counter, service.typical_cost) == (2, *before)
    polite.charge(1000, 1000)
    turns.leave(polite)
    assert (service.running, service.counter, service.typical_cost) == (1, *before)
    turns.leave(running)


async def test_who_asks_again_hears_when_someone_has_left() -> None:
    turns = Turns(slots=1, seats=1, turn_s=1, max_waiting=9)
    running = turns.join("a")
    heard = asyncio.ensure_future(turns.someone_left())
    await asyncio.sleep(0)
    assert not heard.done()
    turns.leave(running)
    await asyncio.wait_for(heard, PATIENCE_S)
