"""Figures whose answers are known by hand."""

from __future__ import annotations

from dataclasses import astuple

import pytest

from loadtests.figures import Figures, Interval, Slo, by_model, ratio
from loadtests.generator import Outcome

# Two requests, 3 tokens each. The first is sent at 0 s, first token at 1 s, then one a second: ends at 3 s.
# The second is sent at 1 s, first token at 3 s, then half a second each: ends at 4 s.
FIRST = Outcome("a", 0.0, 1.0, (1.0, 1.0), 3.0, 10, 3)
SECOND = Outcome("b", 1.0, 2.0, (0.5, 0.5), 3.0, 10, 3)
ANY = Slo(100, 100)


def test_rates_are_over_the_time_from_the_first_request_to_the_last_token() -> None:
    figures = Figures.of([FIRST, SECOND], ANY)

    assert figures.requests == 2
    assert figures.output_tokens_per_s == pytest.approx(6 / 4)
    assert figures.decode_tokens_per_s == pytest.approx(4 / 3)  # 4 tokens after the first ones, from 1 s to 4 s
    assert figures.goodput_per_s == pytest.approx(2 / 4)


def test_latencies_are_percentiles_over_requests_and_over_intervals() -> None:
    figures = Figures.of([FIRST, SECOND], ANY)

    assert astuple(figures.ttft_s) == pytest.approx((1.5, 1.95, 1.99))
    assert figures.itl_s.p50 == pytest.approx(0.75)
    assert figures.latency_s.p99 == pytest.approx(3.0)


@pytest.mark.parametrize(("slo", "kept"), [(Slo(2, 1), 2), (Slo(1, 1), 1), (Slo(2, 0.5), 1), (Slo(0.5, 1), 0)])
def test_goodput_counts_requests_that_keep_both_bounds(slo: Slo, kept: int) -> None:
    assert Figures.of([FIRST, SECOND], slo).goodput_per_s == pytest.approx(kept / 4)


def test_an_answer_of_one_token_has_no_decoding() -> None:
    assert Figures.of([Outcome("a", 0.0, 1.0, (), 1.0, 10, 1)], ANY).decode_tokens_per_s == 0


def test_an_interval_is_students() -> None:
    assert Interval.of([5.0]) == Interval(5.0, 5.0, 5.0)
    # n = 3, mean 2, s = 1: half width 4.303 / √3
    assert astuple(Interval.of([1.0, 2.0, 3.0])) == pytest.approx((2.0, 2 - 2.484, 2 + 2.484), abs=1e-3)


def test_a_ratio_is_the_geometric_mean_over_pairs() -> None:
    assert ratio([2.0, 8.0], [1.0, 1.0]).mean == pytest.approx(4.0)
    certain = ratio([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])  # always twice as fast, whatever the noise of both did
    assert (certain.low, certain.mean, certain.high) == pytest.approx((2.0, 2.0, 2.0))


def test_models_come_busiest_first() -> None:
    assert list(by_model([SECOND, FIRST, FIRST])) == ["a", "b"]
