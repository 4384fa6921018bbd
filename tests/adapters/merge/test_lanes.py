from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from adapters.merge.lanes import current_lane, side_by_side


def traveller(name: str, seen: list[str], *stops: str) -> Callable[[], str]:
    def travel() -> str:
        for stop in stops:
            lane = current_lane()
            assert lane is not None
            lane.wait_for(stop)
            seen.append(f"{name} {stop}")
        return name

    return travel


def test_nobody_goes_on_before_all_have_come_as_far() -> None:
    seen: list[str] = []
    calls = [traveller(name, seen, "first", "second") for name in "ab"]
    assert list(side_by_side(calls, lambda stop: seen.append(f"ready {stop}"))) == ["a", "b"]
    assert seen == ["ready first", "a first", "b first", "ready second", "a second", "b second"]


def test_a_result_is_there_before_the_next_call_goes_on() -> None:
    seen: list[str] = []
    results = side_by_side([traveller(name, seen, "end") for name in "ab"], lambda stop: None)
    assert (next(results), list(seen)) == ("a", ["a end"])
    assert list(results) == ["b"]
    assert seen == ["a end", "b end"]


def test_results_stay_in_order_when_calls_take_other_ways() -> None:
    calls = [traveller("a", [], "long", "longer"), traveller("b", []), traveller("c", [], "other")]
    assert list(side_by_side(calls, lambda stop: None)) == ["a", "b", "c"]


def test_what_one_raises_ends_all_of_them() -> None:
    seen: list[str] = []

    def breaks() -> str:
        raise ValueError("broken")

    before = threading.active_count()
    with pytest.raises(ValueError, match="broken"):
        list(side_by_side([breaks, traveller("a", seen, "first")], lambda stop: None))
    assert seen == []
    assert threading.active_count() == before


def test_who_stops_listening_leaves_nothing_behind() -> None:
    before = threading.active_count()
    results = side_by_side([traveller(name, [], "end") for name in "abc"], lambda stop: None)
    assert next(results) == "a"
    results.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before
