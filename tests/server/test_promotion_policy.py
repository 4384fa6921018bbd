"""What should change, looked at once, and what comes of it when it is looked at for hours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from server.promotion_policy import Decision, Memory, Past, Prediction, Rules, Situation, Standing, decide
from server.traffic import Asked

RULES = Rules(rise_share=0.4, tokens_per_minute=100, rise_s=30, fall_s=60, min_life_s=300, cool_down_s=100, most=1)


def asked(**shares: float) -> dict[str, Asked]:
    """Of 1,000 tokens a minute; `a=0.5` is `a@1`."""
    return {f"{name}@1": Asked(1000 * share, share, 10) for name, share in shares.items()}


def long_since(*names: str) -> Memory:
    always = {f"{name}@1": 0.0 for name in names}
    return Memory(many_since=always, few_since=always)


def look(situation: Situation, memory: Memory, rules: Rules = RULES) -> dict[str, Decision]:
    return {each.ref: each for each in decide(situation, memory, rules)[0]}


def test_who_is_asked_by_many_for_long_enough_is_promoted() -> None:
    situation = Situation(1000.0, asked(a=0.6, b=0.1))
    assert decide(situation, Memory(), RULES)[0][0].reason == (
        "a@1 has 60.0% of the tokens, 600 a minute, but only for 0 of 30 s"
    )
    found = look(situation, Memory(many_since={"a@1": 970.0}))
    assert found.keys() == {"a@1"}
    assert found["a@1"].action == "promote"
    assert found["a@1"].reason == (
        "a@1 has 60.0% of the tokens, 600 a minute for 30 s, at least 40.0% is asked for; its gain cannot be "
        "predicted: how fast its LoRA path is was not measured yet"
    )
    assert found["a@1"].figures["share"] == 0.6
    assert found["a@1"].figures["predicted_speedup"] is None


def test_a_large_share_of_next_to_nothing_is_not_enough() -> None:
    assert look(Situation(1000.0, {"a@1": Asked(99.0, 1.0, 3)}), long_since("a")) == {}


def test_a_share_that_dips_begins_anew() -> None:
    _, memory = decide(Situation(0.0, asked(a=0.5)), Memory(), RULES)
    _, memory = decide(Situation(20.0, asked(a=0.39)), memory, RULES)
    decisions, memory = decide(Situation(40.0, asked(a=0.5)), memory, RULES)
    assert [each.action for each in decisions] == ["wait"]
    assert memory.many_since == {"a@1": 40.0}


def test_the_gain_is_predicted_from_what_was_measured() -> None:
    situation = Situation(1000.0, asked(a=0.6), predictions={"a@1": Prediction(0.042, 0.03)})
    promoted = look(situation, long_since("a"))["a@1"]
    assert promoted.reason.endswith(
        "predicted 1.40 times as fast (42.0 ms a token by LoRA, 30.0 ms by a merged engine here)"
    )
    assert promoted.figures["predicted_speedup"] == 1.4


def test_a_gain_that_was_measured_as_none_is_not_worth_an_engine_but_a_proxy_vetoes_nothing() -> None:
    measured, proxy = Prediction(0.03, 0.03), Prediction(0.03, 0.03, "proxy")
    situation = Situation(1000.0, asked(a=0.6), predictions={"a@1": measured})
    refused = look(situation, long_since("a"))["a@1"]
    assert (refused.action, refused.reason.endswith("by a merged engine here), less than 1.05")) == ("wait", True)
    told = look(replace(situation, predictions={"a@1": proxy}), long_since("a"))["a@1"]
    assert (told.action, "the base, as a proxy for a merged engine" in told.reason) == ("promote", True)


def test_who_failed_rests_twice_as_long_each_time() -> None:
    assert [RULES.rest_s(failures) for failures in (0, 1, 2, 3, 60)] == [0, 100, 200, 400, 86_400]
    situation = Situation(1000.0, asked(a=0.6), past={"a@1": Past(2, 850.0)})
    resting = look(situation, long_since("a"))["a@1"]
    assert resting.reason.endswith("but it rests for 50 s more, after 2 failed attempts in a row")
    assert look(replace(situation, now=1050.0), long_since("a"))["a@1"].action == "promote"


def test_nothing_is_promoted_into_memory_that_is_not_there() -> None:
    situation = Situation(1000.0, asked(a=0.6), no_room="an engine takes 2.1 GiB and 1.0 are free")
    assert look(situation, long_since("a"))["a@1"].reason.endswith(", but an engine takes 2.1 GiB and 1.0 are free")
    assert "max_merged_engines is 0" in look(situation, long_since("a"), replace(RULES, most=0))["a@1"].reason


def test_of_two_the_more_popular_is_first_and_the_other_waits() -> None:
    found = look(Situation(1000.0, asked(a=0.41, b=0.5)), long_since("a", "b"), replace(RULES, most=2))
    assert {ref: each.action for ref, each in found.items()} == {"a@1": "wait", "b@1": "promote"}
    assert found["a@1"].reason == "a@1 waits: one change at a time, and b@1 is changed first"
    building = {"b@1": Standing(990.0, is_changing=True)}
    situation = Situation(1000.0, asked(a=0.41, b=0.5), standing=building)
    assert look(situation, long_since("a", "b"), replace(RULES, most=2))["a@1"].reason.endswith(
        "but one change at a time: b@1 is being changed"
    )


def test_who_is_asked_by_few_keeps_its_engine_for_a_minimum_life_and_a_while() -> None:
    def what(now: float, since: float, few_since: float) -> str:
        situation = Situation(now, asked(a=0.19), {"a@1": Standing(since)})
        return look(situation, Memory(few_since={"a@1": few_since}))["a@1"].action

    assert what(now=1000.0, since=701.0, few_since=0.0) == "keep"
    assert what(now=1000.0, since=700.0, few_since=941.0) == "keep"
    assert what(now=1000.0, since=700.0, few_since=940.0) == "demote"
    in_between = Situation(1000.0, asked(a=0.21), {"a@1": Standing(0.0)})
    assert look(in_between, Memory(few_since={"a@1": 0.0}))["a@1"].action == "keep"


def test_the_reason_of_a_demotion_has_its_figures() -> None:
    situation = Situation(1000.0, asked(a=0.05), {"a@1": Standing(400.0)})
    assert look(situation, Memory(few_since={"a@1": 900.0}))["a@1"].reason == (
        "a@1 has 5.0% of the tokens, 50 a minute, less than 20.0% for 100 s, after 600 s with its engine"
    )


def test_a_newcomer_takes_the_place_of_the_least_asked_where_that_is_worth_a_rebuild() -> None:
    situation = Situation(1000.0, asked(a=0.24, b=0.48), {"a@1": Standing(700.0)})
    found = look(situation, long_since("b"))
    assert found["a@1"].action == "demote"
    assert found["a@1"].reason == (
        "a@1 makes room: b@1 has 48.0% of the tokens, 480 a minute, and a@1 has 24.0% of the tokens, 240 a minute"
    )
    assert found["b@1"].action == "wait"
    not_worth = look(replace(situation, asked=asked(a=0.25, b=0.48)), long_since("b"))
    assert {ref: each.action for ref, each in not_worth.items()} == {"a@1": "keep", "b@1": "wait"}
    assert not_worth["b@1"].reason.endswith("but a@1 has 250 a minute: not worth a rebuild below 2 times")
    young = look(replace(situation, standing={"a@1": Standing(701.0)}), long_since("b"))
    assert young["a@1"].action == "keep"
    assert young["b@1"].reason.endswith("but all 1 places are taken, and none of those there may go yet")


def test_nobody_makes_room_for_one_that_would_not_be_promoted() -> None:
    standing = {"a@1": Standing(0.0)}
    situation = Situation(1000.0, asked(a=0.22, b=0.48), standing, past={"b@1": Past(1, 990.0)})
    assert look(situation, long_since("b"))["a@1"].action == "keep"


def test_what_a_person_promoted_stays() -> None:
    by_hand = {"a@1": Standing(0.0, by_hand=True)}
    found = look(Situation(1000.0, asked(b=0.9), by_hand), long_since("a", "b"))
    assert {ref: each.action for ref, each in found.items()} == {"a@1": "keep", "b@1": "wait"}


@dataclass
class World:
    """Engines that appear a while after they were decided on, or fail; looked at every twenty seconds."""

    rules: Rules
    build_s: float
    fails: frozenset[str]
    now: float = 0.0
    standing: dict[str, Standing] = field(default_factory=dict)
    past: dict[str, Past] = field(default_factory=dict)
    memory: Memory = field(default_factory=Memory)
    promoted: list[tuple[float, str]] = field(default_factory=list)
    demoted: list[tuple[float, str, float]] = field(default_factory=list)

    def run(self, shares: Mapping[str, float], seconds: float) -> None:
        end = self.now + seconds
        while self.now < end:
            self.now += 20
            self._settle()
            total = sum(shares.values()) or 1
            seen = {ref: Asked(1000 * share / total, share / total, 1) for ref, share in shares.items()}
            situation = Situation(self.now, seen, dict(self.standing), dict(self.past))
            decisions, memory = decide(situation, self.memory, self.rules)
            assert (decisions, memory) == decide(situation, self.memory, self.rules)  # deterministic
            self.memory = memory
            changes = [each for each in decisions if each.action in ("promote", "demote")]
            assert len(changes) <= 1
            for each in changes:
                self._change(each)
            assert len(self.standing) <= self.rules.most

    def _settle(self) -> None:
        for ref, each in list(self.standing.items()):
            if each.is_changing and self.now >= each.since + self.build_s:
                if ref in self.fails:
                    del self.standing[ref]
                    self.past[ref] = Past(self.past[ref].failures + 1 if ref in self.past else 1, self.now)
                else:
                    self.standing[ref] = Standing(self.now)

    def _change(self, decision: Decision) -> None:
        if decision.action == "promote":
            assert not any(each.is_changing for each in self.standing.values())
            self.standing[decision.ref] = Standing(self.now, is_changing=True)
            self.promoted.append((self.now, decision.ref))
        else:
            gone = self.standing.pop(decision.ref)
            assert not gone.is_changing
            self.demoted.append((self.now, decision.ref, self.now - gone.since))


REFS = st.sampled_from([f"{name}@1" for name in "abcde"])
SHARES = st.dictionaries(REFS, st.floats(0.01, 1.0), min_size=1)
PHASES = st.lists(st.tuples(SHARES, st.integers(1, 40)), min_size=1, max_size=4)
SOME_RULES = st.builds(
    Rules,
    rise_share=st.floats(0.05, 0.9),
    tokens_per_minute=st.just(1.0),
    rise_s=st.sampled_from([0.0, 30.0, 120.0]),
    fall_s=st.sampled_from([0.0, 60.0]),
    min_life_s=st.sampled_from([60.0, 300.0]),
    cool_down_s=st.sampled_from([10.0, 100.0]),
    most=st.integers(0, 3),
)


@settings(deadline=None, max_examples=50)
@given(rules=SOME_RULES, phases=PHASES, build_s=st.sampled_from([0.0, 25.0, 100.0]), fails=st.frozensets(REFS))
def test_it_never_flaps_and_never_has_too_many(
    rules: Rules, phases: list[tuple[dict[str, float], int]], build_s: float, fails: frozenset[str]
) -> None:
    built = World(rules, build_s, fails)
    for shares, minutes in phases:
        built.run(shares, 60.0 * minutes)
    assert all(life >= rules.min_life_s for _, _, life in built.demoted)
    for ref in fails:
        attempts = [at for at, each in built.promoted if each == ref]
        rests = [later - earlier for earlier, later in pairwise(attempts)]
        assert all(rest >= rules.rest_s(number + 1) for number, rest in enumerate(rests))


@settings(deadline=None, max_examples=50)
@given(rules=SOME_RULES, before=PHASES, shares=SHARES)
def test_a_constant_load_comes_to_rest(
    rules: Rules, before: list[tuple[dict[str, float], int]], shares: dict[str, float]
) -> None:
    built = World(rules, 25.0, frozenset())
    for others, minutes in before:
        built.run(others, 60.0 * minutes)
    built.run(shares, 3600.0)
    changes = len(built.promoted) + len(built.demoted)
    built.run(shares, 7200.0)
    assert len(built.promoted) + len(built.demoted) == changes
    deserving = [ref for ref, share in shares.items() if share / sum(shares.values()) >= rules.rise_share]
    assert len(built.standing) == min(rules.most, len(built.standing)) >= min(rules.most, len(deserving), 1)
