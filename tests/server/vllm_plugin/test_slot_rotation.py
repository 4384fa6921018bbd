"""Slots that go round: who computes in a step."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from server.vllm_plugin.slot_rotation import Rotation


class Steps:
    """A rotation under a clock that each step moves on by `step_s`; every adapter that computes pays 1."""

    def __init__(self, slots: int, turn_s: float, step_s: float = 1.0) -> None:
        self.now_s = 0.0
        self.step_s = step_s
        self.rotation = Rotation(slots, turn_s, lambda: self.now_s)
        self.computed: Counter[int] = Counter()
        self.changes = 0
        self._last: frozenset[int] = frozenset()

    def step(self, *wanted: int) -> set[int]:
        chosen = self.rotation.choose(set(wanted))
        for adapter in chosen:
            self.rotation.charge(adapter, 1.0)
        self.computed.update(chosen)
        self.changes += len(chosen - self._last)
        self._last = chosen
        self.now_s += self.step_s
        return set(chosen)


def test_nobody_pauses_while_there_is_a_slot_for_all() -> None:
    steps = Steps(slots=3, turn_s=0)
    assert [steps.step(1, 2, 3) for _ in range(5)] == [{1, 2, 3}] * 5
    assert steps.step() == set()


def test_a_newcomer_need_not_wait_for_a_turn_of_a_flood_to_end() -> None:
    steps = Steps(slots=1, turn_s=30)
    assert [steps.step(1) for _ in range(3)] == [{1}] * 3
    assert steps.step(1, 2) == {2}, "a tenth of the turn is over"
    assert steps.step(1) == {1}, "and it gives the slot back when it is done"
    assert [steps.step(1, 2) for _ in range(4)] == [{1}] * 2 + [{2}] * 2, "not at once: the slot has just changed hands"


def test_a_slot_is_kept_for_a_turn() -> None:
    steps = Steps(slots=1, turn_s=3)
    chosen = [steps.step(1, 2) for _ in range(12)]
    assert chosen == [{1}, *[{2}] * 3, *[{1}] * 3, *[{2}] * 3, *[{1}] * 2], "the second came as a newcomer"
    assert steps.changes == 5


def test_who_leaves_and_comes_back_is_not_behind_one_who_came_meanwhile() -> None:
    steps = Steps(slots=1, turn_s=0)
    for _ in range(100):
        steps.step(1)
    steps.step(2)
    assert Counter(adapter for _ in range(20) for adapter in steps.step(1, 2)) == {1: 10, 2: 10}


def test_one_who_was_away_saves_up_nothing() -> None:
    steps = Steps(slots=1, turn_s=0)
    steps.step(1)
    for _ in range(50):
        steps.step(2)
    for _ in range(20):
        steps.step(1, 2)
    assert abs(steps.computed[1] - 1 - (steps.computed[2] - 50)) <= 1


def test_one_who_received_much_and_left_for_a_moment_does_not_start_afresh() -> None:
    steps = Steps(slots=1, turn_s=0)
    for _ in range(10):
        steps.rotation.choose({1, 2})
        steps.rotation.charge(1, 5.0)
        steps.now_s += 1
    steps.rotation.choose({2})
    assert all(steps.step(1, 2) == {2} for _ in range(10))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sets(st.integers(1, 6), max_size=6), max_size=60), st.integers(1, 3), st.integers(0, 3))
def test_any_traffic(traffic: list[set[int]], slots: int, turn_s: int) -> None:
    steps = Steps(slots, turn_s)
    for wanted in traffic:
        chosen = steps.step(*wanted)
        assert chosen <= wanted
        assert len(chosen) == min(slots, len(wanted)), "work-conserving"
    assert len(steps.rotation._served) <= 6


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 7), st.integers(1, 3), st.integers(0, 4))
def test_all_that_stay_receive_the_same(adapters: int, slots: int, turn_s: int) -> None:
    steps = Steps(slots, turn_s)
    for _ in range(400):
        steps.step(*range(adapters))
    received = [steps.computed[adapter] for adapter in range(adapters)]
    assert max(received) - min(received) <= 2 * turn_s + 2
