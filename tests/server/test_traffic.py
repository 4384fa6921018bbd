from __future__ import annotations

import pytest

from server.traffic import BUCKETS, MOST_SAMPLES, Asked, Sample, Traffic


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def traffic(clock: Clock) -> Traffic:
    return Traffic(60.0, most=3, clock=clock)


def test_shares_are_of_all_tokens_those_of_the_base_included(traffic: Traffic) -> None:
    traffic.ended(None, "base", tokens=50)
    traffic.ended("a@1", "lora", tokens=120)
    traffic.ended("a@1", "merged", tokens=30)
    assert traffic.asked() == {"a@1": Asked(tokens_per_minute=150.0, share=0.75, requests=2)}


def test_what_lies_behind_the_window_is_forgotten_bucket_by_bucket(traffic: Traffic, clock: Clock) -> None:
    traffic.ended("a@1", "lora", tokens=100)
    clock.now += 30
    traffic.ended("a@1", "lora", tokens=50)
    traffic.ended("b@1", "lora", tokens=50)
    assert traffic.asked()["a@1"] == Asked(150.0, 0.75, 2)
    clock.now += 60 / BUCKETS * (BUCKETS / 2)
    assert traffic.asked()["a@1"] == Asked(50.0, 0.5, 1)
    clock.now += 60
    assert traffic.asked() == {}


def test_the_least_asked_are_forgotten_where_there_are_too_many_but_count_in_the_whole(traffic: Traffic) -> None:
    for ref, tokens in (("a@1", 40), ("b@1", 1), ("c@1", 30), ("d@1", 2), ("e@1", 20), ("f@1", 3), ("g@1", 4)):
        traffic.ended(ref, "lora", tokens=tokens, ttft_s=0.1, tpot_s=0.01)
    assert {ref: asked.share for ref, asked in traffic.asked().items()} == {
        "a@1": 0.4,
        "c@1": 0.3,
        "e@1": 0.2,
        "g@1": 0.04,
    }
    assert traffic.samples("b@1", "lora") == []


def test_many_versions_that_nobody_asks_for_again_take_no_memory(traffic: Traffic, clock: Clock) -> None:
    for number in range(500):
        clock.now += 0.5
        traffic.ended(f"a@{number}", "lora", tokens=1, ttft_s=0.1, tpot_s=0.01)
    assert len(traffic._versions) <= 6
    assert all(len(version.window.buckets) <= BUCKETS for version in traffic._versions.values())


def test_samples_are_kept_by_version_and_way(traffic: Traffic, clock: Clock) -> None:
    traffic.ended("a@1", "lora", tokens=9, ttft_s=0.2, tpot_s=0.03, load=2)
    clock.now += 1
    traffic.ended("a@1", "merged", tokens=9, ttft_s=0.1, tpot_s=0.02, load=4)
    traffic.ended("a@1", "merged", tokens=9)  # nothing was generated
    traffic.ended(None, "base", tokens=9, ttft_s=0.1, tpot_s=None)
    assert traffic.samples("a@1", "lora") == [Sample(1000.0, 0.2, 0.03, 2)]
    assert traffic.samples("a@1", "merged", since=1001.0) == [Sample(1001.0, 0.1, 0.02, 4)]
    assert traffic.samples("a@1", "lora", since=1000.5) == []
    traffic.ended("b@1", "merged", tokens=9, ttft_s=0.3, tpot_s=0.02)
    assert traffic.samples_of("merged") == [Sample(1001.0, 0.1, 0.02, 4), Sample(1001.0, 0.3, 0.02, 1)]
    assert traffic.samples(None, "base") == [Sample(1001.0, 0.1, None, 1)]


def test_of_samples_the_last_are_kept(traffic: Traffic) -> None:
    for number in range(MOST_SAMPLES + 5):
        traffic.ended("a@1", "lora", tokens=1, ttft_s=float(number + 1))
    kept = traffic.samples("a@1", "lora")
    assert (len(kept), kept[0].ttft_s) == (MOST_SAMPLES, 6.0)


def test_a_clock_that_is_set_back_does_no_harm(traffic: Traffic, clock: Clock) -> None:
    traffic.ended("a@1", "lora", tokens=10)
    clock.now -= 500
    traffic.ended("a@1", "lora", tokens=10)
    assert traffic.asked()["a@1"].requests == 2
