"""Traces: reproducible, and shaped as their workload says."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from loadtests.trace import CHUNK_TOKENS, Lengths, Request, Trace, Workload, make_trace, together, zipf_weights

OPEN = Workload(("a", "b", "c", "d"), 4000, Lengths(8, 64), Lengths(4, 4), zipf=1.0, rate=5.0)


def test_the_same_seed_gives_the_same_trace_and_another_seed_another() -> None:
    assert make_trace(OPEN, 7) == make_trace(OPEN, 7)
    assert make_trace(OPEN, 7) != make_trace(OPEN, 8)


def test_zipf_weights_are_the_power_law() -> None:
    assert zipf_weights(3, 1.0) == pytest.approx([6 / 11, 3 / 11, 2 / 11])
    assert zipf_weights(4, 0.0) == pytest.approx([0.25] * 4)


def test_popularity_follows_the_weights() -> None:
    asked = Counter(request.model for request in make_trace(OPEN, 1).requests)

    shares = [asked[model] / OPEN.requests for model in OPEN.models]
    assert shares == pytest.approx(list(zipf_weights(4, 1.0)), abs=0.03)


def test_without_a_popularity_models_take_turns() -> None:
    trace = make_trace(replace(OPEN, zipf=None, requests=6), 1)

    assert [request.model for request in trace.requests] == ["a", "b", "c", "d", "a", "b"]


@pytest.mark.parametrize("burstiness", [1.0, 8.0])
def test_arrivals_have_the_rate_and_the_variation_that_was_asked(burstiness: float) -> None:
    arrivals = [request.at_s for request in make_trace(replace(OPEN, burstiness=burstiness), 3).requests]

    gaps = np.diff(arrivals)
    assert arrivals[0] == 0
    assert gaps.mean() == pytest.approx(1 / 5.0, rel=0.15)
    assert gaps.var() / gaps.mean() ** 2 == pytest.approx(burstiness, rel=0.25)


def test_a_closed_loop_is_due_at_once_and_bounded() -> None:
    trace = make_trace(replace(OPEN, rate=None, concurrency=8), 1)

    assert {request.at_s for request in trace.requests} == {0.0}
    assert trace.concurrency == 8


def test_lengths_stay_within_their_bounds_and_reach_both() -> None:
    random = np.random.default_rng(0)

    assert set(Lengths(3, 6).draw(random, 500)) == {3, 4, 5, 6}
    drawn = Lengths(2, 200, "log").draw(random, 5000)
    assert (min(drawn), max(drawn)) == (2, 200)
    assert np.median(drawn) == pytest.approx(np.sqrt(2 * 200), rel=0.15)  # the middle of a log scale


def test_traces_put_together_stay_in_order_of_time() -> None:
    one, two = make_trace(replace(OPEN, requests=20), 1), make_trace(replace(OPEN, requests=10, models=("z",)), 1)

    both = together(one, two)

    assert Counter(both.requests) == Counter(one.requests + two.requests)
    assert all(a.at_s <= b.at_s for a, b in pairwise(both.requests))


def test_every_workload_and_seed_has_prompts_of_its_own() -> None:
    made = [make_trace(workload, seed) for workload in (OPEN, replace(OPEN, requests=9)) for seed in (0, 1)]

    assert len({trace.number for trace in made}) == 4


def test_no_two_prompts_of_a_file_share_a_chunk_nor_do_two_traces(tmp_path: Path) -> None:
    requests = tuple(Request(0.5 * number, "a", length, 9) for number, length in enumerate((1, 16, 17, 100)))
    ids: list[int] = []
    for seed in (0, 1, 2):
        Trace(requests, None, seed).write(tmp_path / "trace.jsonl")
        lines = [json.loads(line) for line in (tmp_path / "trace.jsonl").read_text().splitlines()]
        assert [(line["timestamp"], line["input_length"], line["output_length"]) for line in lines] == [
            (request.at_s, request.input_tokens, 9) for request in requests
        ]
        assert all(len(line["hash_ids"]) * CHUNK_TOKENS >= line["input_length"] for line in lines)
        ids += [each for line in lines for each in line["hash_ids"]]

    assert len(ids) == len(set(ids))
