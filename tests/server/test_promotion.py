"""Promotions from traffic to a kept engine and back, with a clock that the test turns. Engines are fake and jobs are
ended by the test; traffic, policy, stories and the engines' lives are the real ones."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from adapters.job_records import Job
from adapters.jobs import Jobs
from adapters.promotions import Promotion, Promotions
from adapters.registry import Registry, Version
from server.engine.fake import FakeEngine
from server.engine.memory_plan import MemoryPlan
from server.engine.merged import MergedEngines
from server.engine.pool import EnginePool
from server.errors import MergedEngineRefused
from server.fairness import Turns
from server.promotion import Promoter, rules_of
from server.promotion_course import MEASURE_S, Mode
from server.promotion_ledger import Ledger
from server.resolve import engine_name
from server.settings import Settings
from server.telemetry import Telemetry
from server.traffic import Traffic
from tests.adapters.test_registry import manifest
from tests.server.harness import until

CHOSEN: dict[str, Any] = {
    "promotion_share": 0.4,
    "promotion_tokens_per_minute": 10,
    "promotion_window_s": 60,
    "promotion_min_life_s": 120,
    "promotion_cool_down_s": 200,
    "promotion_requests": 10,
}
RULES = rules_of(Settings(**CHOSEN))
LORA_S, MERGED_S = 0.04, 0.03
"""From token to token."""


@dataclass
class Bench:
    """One server's promotions. What outlives it is in `registry`."""

    registry: Registry
    mode: Mode = "auto"
    now: float = 1_000_000.0
    tokens_s: dict[str, float] = field(default_factory=lambda: {"lora": LORA_S, "merged": MERGED_S})
    begun: list[str] = field(default_factory=list)
    no_room: str | None = None
    more: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.base = EnginePool(FakeEngine)
        plan = MemoryPlan({"weights": 1})
        self.merged = MergedEngines(
            self.base,
            lambda name, _: FakeEngine(name),
            lambda _: plan,
            lambda: 100,
            lambda: Turns(slots=1, seats=4, turn_s=0, max_waiting=9),
            most=RULES.most,
            reserve=0,
        )
        self.jobs = Jobs(self.registry.database)
        self.traffic = Traffic(60.0, clock=self.clock)
        self.telemetry = Telemetry(10)
        self.stories = Promotions(self.registry.database, "here")
        ledger = Ledger(self.stories, self.registry, self.telemetry, self.clock)
        settings = Settings(promotion=self.mode, **CHOSEN, **self.more)
        self.promoter = Promoter(
            settings, self.traffic, ledger, self.merged, self.jobs, begin=self.begin, room=self._room
        )

    def clock(self) -> float:
        return self.now

    def _room(self) -> None:
        if self.no_room is not None:
            raise MergedEngineRefused(self.no_room)

    def begin(self, version: Version, _: Mapping[str, Any]) -> Job:
        self.begun.append(version.ref)
        return self.jobs.create("merged_engine", {"ref": version.ref})

    def add(self, *names: str) -> None:
        for number, name in enumerate(names):
            self.registry.add_version(name, manifest(f"{len(name)}{number}"))

    def version(self, name: str) -> Version:
        return self.registry.resolve(name, "1")

    def way(self, name: str) -> str:
        engine = self.merged.find(engine_name(self.version(name)))
        return "merged" if engine is not None and engine.state == "ready" else "lora"

    async def ask(self, seconds: float, **tokens: int) -> None:
        """Traffic for so long: a request of each every ten seconds, and a look after each."""
        for _ in range(int(seconds / 10)):
            self.now += 10
            for name, count in tokens.items():
                way = self.way(name)
                tpot_s = self.tokens_s[way]
                for _ in range(2):
                    self.traffic.ended(f"{name}@1", way, tokens=count, ttft_s=0.1, tpot_s=tpot_s, load=2)
            await self.promoter.look()

    async def built(self, result: dict[str, Any] | None = None) -> None:
        """The job that waits does its work."""
        job = self.jobs.claim(["merged_engine"], "me")
        assert job is not None
        engine = await self.merged.promote(engine_name(self.version(job.params["ref"].split("@")[0])), Path("merged"))
        engine.since = self.now
        self.jobs.finish(job.id, "me", result or {}, {})
        await self.promoter.look()

    async def failed(self, code: str, message: str) -> None:
        job = self.jobs.claim(["merged_engine"], "me")
        assert job is not None
        self.jobs.fail(job.id, "me", code, message)
        await self.promoter.look()

    def told(self) -> list[tuple[str, str]]:
        return [(story.ref, story.state) for story in self.all()]

    def all(self) -> list[Promotion]:
        return sorted(self.stories.promotions(), key=lambda story: (story.created_at, story.id))

    def last(self) -> Promotion:
        return self.all()[-1]

    def outcomes(self) -> dict[str, float]:
        (family,) = (each for each in self.telemetry._registry.collect() if each.name == "loraplex_promotions")
        return {each.labels["outcome"]: each.value for each in family.samples if each.name.endswith("_total")}

    async def kept(self, name: str) -> None:
        """Asked for, built and measured."""
        await self.ask(40, **{name: 100})
        await self.built()
        await self.ask(60, **{name: 100})
        assert self.last().state == "serving"


@pytest.fixture(autouse=True)
def _looks_only_when_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.promotion.LOOK_S", 3600.0)


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    registry = Registry(f"sqlite:///{tmp_path}/r.db")
    yield registry
    registry.close()


@pytest.fixture
async def bench(registry: Registry) -> AsyncIterator[Bench]:
    async with started(Bench(registry)) as started_bench:
        yield started_bench


@asynccontextmanager
async def started(made: Bench) -> AsyncIterator[Bench]:
    made.base.open()
    await made.base.ready()
    await made.promoter.open()
    try:
        yield made
    finally:
        await made.promoter.close()
        await made.merged.close()
        await made.base.close()


async def test_popularity_moves_and_the_engine_with_it(bench: Bench) -> None:
    bench.add("a", "b")
    await bench.ask(10, a=100, b=20)
    assert bench.told() == []
    await bench.ask(30, a=100, b=20)
    assert (bench.told(), bench.begun) == ([("a@1", "building")], ["a@1"])
    await bench.built({"fidelity": {"kl": 0.0004}})
    assert (bench.told(), bench.way("a")) == ([("a@1", "measuring")], "merged")
    await bench.ask(60, a=100, b=20)
    kept = bench.last()
    assert kept.state == "serving"
    assert kept.reason == (
        "kept: 1.33 times as fast as by LoRA before: 40.0 ms a token before, 30.0 ms now, 8 requests under a like load"
    )
    assert kept.figures["fidelity"] == {"kl": 0.0004}
    assert kept.figures["measured"]["speedup"] == 1.33333
    assert kept.figures["share"] == pytest.approx(0.833, abs=0.01)
    assert kept.figures["predicted_speedup"] is None

    await bench.ask(100, a=10, b=200)
    assert bench.told() == [("a@1", "demoted"), ("b@1", "building")]
    assert "a@1 makes room: b@1 has" in bench.all()[0].reason
    assert bench.way("a") == "lora"
    assert bench.last().figures["predicted_speedup"] == pytest.approx(1.333, abs=0.001)
    assert (
        "predicted 1.33 times as fast (40.0 ms a token by LoRA, 30.0 ms by a merged engine here)"
        in (bench.last().events[0]["message"])
    )
    await bench.built()
    await bench.ask(60, a=10, b=200)
    assert bench.told() == [("a@1", "demoted"), ("b@1", "serving")]
    assert bench.way("b") == "merged"
    assert bench.outcomes() == {"kept": 2, "demoted": 1}


async def test_one_that_is_slower_than_lora_is_rolled_back_and_rests(bench: Bench) -> None:
    bench.add("a")
    bench.tokens_s["merged"] = 0.05
    await bench.ask(40, a=100)
    await bench.built()
    await bench.ask(50, a=100)
    rolled_back = bench.last()
    assert rolled_back.state == "rolled_back"
    assert rolled_back.reason.startswith(
        "rolled back: 0.80 times as fast as by LoRA before: 40.0 ms a token before, 50.0 ms now"
    )
    await until(lambda: bench.merged.snapshot() == {})
    await bench.ask(400, a=100)
    assert len(bench.told()) == 1
    (now,) = bench.promoter.decisions
    assert now.action == "wait"
    assert now.reason.endswith("less than 1.05")  # what was measured speaks against it, also after its rest


async def test_a_merge_that_is_too_far_from_its_adapter_is_refused(bench: Bench) -> None:
    bench.add("a")
    await bench.ask(40, a=100)
    await bench.failed("unfaithful_merge", "KL to the adapter on task is 0.2 nats per token, at most 0.01")
    assert bench.told() == [("a@1", "refused")]
    assert bench.last().reason == "KL to the adapter on task is 0.2 nats per token, at most 0.01 (unfaithful_merge)"
    assert (bench.way("a"), bench.outcomes()) == ("lora", {"refused": 1})


async def test_builds_that_fail_are_tried_again_more_and_more_seldom(bench: Bench) -> None:
    bench.add("a")
    await bench.ask(40, a=100)
    for failures in (1, 2, 3):
        await bench.failed("merged_engine_failed", "no such kernel")
        await bench.ask(RULES.rest_s(failures) - 10, a=100)
        assert len(bench.begun) == failures
        await bench.ask(10, a=100)
        assert len(bench.begun) == failures + 1
    assert [state for _, state in bench.told()] == ["failed"] * 3 + ["building"]


async def test_a_job_that_somebody_cancels_is_not_begun_again_at_once(bench: Bench) -> None:
    bench.add("a")
    await bench.ask(40, a=100)
    bench.jobs.cancel(str(bench.last().job))
    await bench.ask(100, a=100)
    assert bench.told() == [("a@1", "cancelled")]


async def test_advice_is_written_down_and_nothing_is_done(registry: Registry) -> None:
    async with started(Bench(registry, mode="advise")) as bench:
        bench.add("a", "b")
        await bench.ask(60, a=100, b=10)
        assert (bench.told(), bench.begun) == ([("a@1", "advised")], [])
        assert "a@1 has 90.9% of the tokens" in bench.last().reason
        await bench.ask(60, a=10, b=100)
        assert bench.told() == [("a@1", "withdrawn"), ("b@1", "advised")]
        assert bench.outcomes() == {"advised": 2, "withdrawn": 1}


async def test_off_is_off(registry: Registry) -> None:
    async with started(Bench(registry, mode="off")) as bench:
        bench.add("a")
        await bench.ask(100, a=100)
        assert (bench.told(), bench.begun, bench.promoter.decisions) == ([], [], ())


async def test_where_there_is_no_room_it_is_said_why(bench: Bench) -> None:
    bench.add("a")
    bench.no_room = "an engine takes 2.1 GiB, free are 1.0 GiB"
    await bench.ask(60, a=100)
    assert bench.told() == []
    assert bench.promoter.decisions[0].reason.endswith(", but an engine takes 2.1 GiB, free are 1.0 GiB")


async def test_too_few_requests_keep_it_and_that_is_said(bench: Bench) -> None:
    bench.add("a")
    await bench.ask(40, a=100)
    await bench.built()
    bench.now += MEASURE_S
    await bench.promoter.look()
    assert bench.last().state == "serving"
    assert bench.last().reason == (
        "kept, its gain is not known: 8 requests by LoRA before and 0 by the merged engine were timed, 5 of each are "
        "needed"
    )


async def test_what_a_person_promotes_has_a_story_too_and_keeps_its_place(bench: Bench) -> None:
    bench.add("a", "b")
    await bench.merged.promote(engine_name(bench.version("a")), Path("merged"))
    await bench.ask(200, a=10, b=200)
    assert [(story.ref, story.state, story.origin) for story in bench.all()] == [("a@1", "serving", "hand")]
    assert {each.ref: each.action for each in bench.promoter.decisions} == {"a@1": "keep", "b@1": "wait"}
    await bench.merged.demote(engine_name(bench.version("a")))
    await bench.promoter.look()
    assert bench.all()[0].state == "demoted"
    assert bench.all()[0].reason == "its engine was taken back by hand"


async def test_what_a_person_takes_back_is_not_built_again_at_once(bench: Bench) -> None:
    bench.add("a")
    await bench.kept("a")
    await bench.merged.demote(engine_name(bench.version("a")))
    await bench.ask(100, a=100)
    assert bench.told() == [("a@1", "cancelled")]
    assert "it rests for" in bench.promoter.decisions[0].reason


async def test_a_version_that_goes_ends_its_story(bench: Bench) -> None:
    bench.add("a")
    await bench.kept("a")
    bench.registry.remove_version("a", 1, with_aliases=True)
    await bench.promoter.look()
    assert (bench.last().state, bench.last().reason) == ("demoted", "its version is out of service")


async def test_an_engine_that_is_given_up_makes_room(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.engine.pool.WATCH_S", 3600.0)  # or it would be found dead, and built again
    bench.add("a")
    await bench.kept("a")
    engine = bench.merged.find(engine_name(bench.version("a")))
    assert engine is not None
    engine.pool.has_given_up, engine.pool.state, engine.pool.reason = True, "failed", "3 times in a row"
    await bench.promoter.look()
    assert bench.last().state == "failed"
    assert bench.last().reason == "its engine was given up: 3 times in a row"
    await until(lambda: bench.merged.snapshot() == {})


async def test_after_a_restart_what_stood_is_built_again_and_is_not_measured_anew(
    bench: Bench, registry: Registry
) -> None:
    bench.add("a")
    await bench.kept("a")
    await bench.merged.close()
    async with started(Bench(registry, now=bench.now + 100)) as after:
        assert after.begun == ["a@1"]
        story = after.last()
        assert (story.state, story.reason) == ("building", "the server was started anew; its engine is built again")
        await after.built()
        assert (after.last().id, after.last().state) == (story.id, "serving")
        await after.ask(100, a=1)  # its minimum life begins anew
        assert after.last().state == "serving"
        await after.promoter.look()


async def test_a_restart_in_the_middle_of_a_build_goes_on_with_its_job(bench: Bench, registry: Registry) -> None:
    bench.add("a")
    await bench.ask(40, a=100)
    async with started(Bench(registry, now=bench.now + 100)) as after:
        await after.promoter.look()
        assert (after.begun, after.told()) == ([], [("a@1", "building")])
        await after.built()
        assert after.told() == [("a@1", "measuring")]
        await after.ask(60, a=100)
        assert after.last().reason.startswith("kept, its gain is not known") or after.last().state == "measuring"


async def test_a_restart_after_the_build_and_before_it_was_noticed(bench: Bench, registry: Registry) -> None:
    bench.add("a")
    await bench.ask(40, a=100)
    job = bench.jobs.claim(["merged_engine"], "me")
    assert job is not None
    bench.jobs.finish(job.id, "me", {}, {})
    async with started(Bench(registry, now=bench.now + 100)) as after:
        assert (after.begun, after.told()) == (["a@1"], [("a@1", "building")])


@pytest.mark.parametrize("mode", ["off", "advise"])
async def test_what_was_earned_under_auto_is_not_built_again_under_another_setting(
    bench: Bench, registry: Registry, mode: Mode
) -> None:
    bench.add("a")
    await bench.kept("a")
    async with started(Bench(registry, mode=mode, now=bench.now)) as after:
        assert (after.begun, after.told()) == ([], [("a@1", "demoted")])
        assert after.last().reason == f"the server was started anew, with promotion = {mode}"


async def test_what_a_person_wanted_is_built_again_whatever_the_setting(bench: Bench, registry: Registry) -> None:
    bench.add("a")
    await bench.merged.promote(engine_name(bench.version("a")), Path("merged"))
    await bench.promoter.look()
    async with started(Bench(registry, mode="off")) as after:
        assert (after.begun, after.told()) == (["a@1"], [("a@1", "building")])


async def test_rests_outlive_the_process(bench: Bench, registry: Registry) -> None:
    bench.add("a")
    await bench.ask(40, a=100)
    await bench.failed("merged_engine_failed", "no such kernel")
    async with started(Bench(registry, now=bench.now)) as after:
        await after.ask(100, a=100)
        assert after.begun == []
        await after.ask(150, a=100)
        assert after.begun == ["a@1"]


async def test_what_was_gained_is_known_after_a_restart_under_the_same_conditions(
    bench: Bench, registry: Registry
) -> None:
    bench.add("a", "b")
    bench.tokens_s["merged"] = 0.05
    await bench.ask(40, a=100)
    await bench.built()
    await bench.ask(50, a=100)
    assert bench.last().state == "rolled_back"

    async def begun(more: dict[str, Any] | None = None) -> list[str]:
        async with started(Bench(registry, now=bench.now, more=more or {})) as after:
            await after.ask(60, b=100)
            return after.begun

    assert await begun() == []
    assert await begun({"dtype": "float32", "quantization": "none"}) == ["b@1"]


async def test_another_server_on_the_same_registry_minds_its_own(bench: Bench, registry: Registry) -> None:
    bench.add("a")
    await bench.kept("a")
    other = Bench(registry, now=bench.now)
    other.stories.server = "there"
    async with started(other) as after:
        assert after.begun == []
        await after.promoter.look()
        assert after.told() == [("a@1", "serving")]


async def test_a_look_that_fails_does_not_end_the_looking(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []

    async def fail() -> None:
        looks.append(1)
        raise RuntimeError("the database is away")

    await bench.promoter.close()
    monkeypatch.setattr("server.promotion.LOOK_S", 0.001)
    monkeypatch.setattr(bench.promoter, "look", fail)
    await bench.promoter.open()
    await until(lambda: len(looks) > 2)
