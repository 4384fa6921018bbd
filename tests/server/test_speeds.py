from __future__ import annotations

import pytest

from server.speeds import FEWEST, compare, typical
from server.traffic import Sample


def samples(tpot_s: float | None, load: int = 1, count: int = FEWEST, ttft_s: float | None = 0.1) -> list[Sample]:
    return [Sample(0.0, ttft_s, tpot_s, load)] * count


def test_half_the_time_is_twice_as_fast() -> None:
    gain = compare(samples(0.04, ttft_s=0.2), samples(0.02))
    assert gain is not None
    assert gain.to_json() == {
        "speedup": 2.0,
        "tpot_before_s": 0.04,
        "tpot_after_s": 0.02,
        "ttft_before_s": 0.2,
        "ttft_after_s": 0.1,
        "requests": 5,
        "like_load": True,
    }


def test_too_few_say_nothing() -> None:
    assert compare(samples(0.04, count=FEWEST - 1), samples(0.02)) is None
    assert compare(samples(0.04), [*samples(0.02, count=FEWEST - 1), *samples(None)]) is None
    assert typical(samples(0.04, count=FEWEST - 1)) is None
    assert typical(samples(0.04)) == 0.04


def test_only_a_like_load_is_compared() -> None:
    """Alone it is twice as fast, among eight as well; that it was mostly asked among eight afterwards says nothing."""
    before = [*samples(0.04, load=1, count=20), *samples(0.2, load=8, count=6)]
    after = [*samples(0.02, load=1, count=6), *samples(0.1, load=9, count=20)]
    gain = compare(before, after)
    assert gain is not None
    assert gain.like_load
    assert gain.speedup == pytest.approx(2.0)


def test_loads_count_by_how_much_they_rest_on() -> None:
    before = [*samples(0.02, load=1, count=9), *samples(0.04, load=4, count=3)]
    after = [*samples(0.01, load=1, count=30), *samples(0.04, load=7, count=3)]
    gain = compare(before, after)
    assert gain is not None
    assert gain.speedup == pytest.approx((9 * 2 + 3 * 1) / 12)


def test_without_a_like_load_all_are_compared_and_that_is_said() -> None:
    gain = compare(samples(0.03, load=1), samples(0.06, load=16))
    assert gain is not None
    assert gain.speedup == pytest.approx(0.5)
    assert not gain.like_load
