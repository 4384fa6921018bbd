"""Engines beside the base engine: built, watched, left and ended, on fake ones."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from server.engine import pool as pools
from server.engine.fake import FakeEngine
from server.engine.memory_plan import MemoryPlan
from server.engine.merged import MOST_FAILURES, MergedEngines
from server.engine.pool import EnginePool
from server.engine.protocol import Engine
from server.errors import EngineUnavailable, MergedEngineRefused
from server.fairness import Turns
from tests.server.harness import until

HERE = Path("merged")


@pytest.fixture(autouse=True)
def _fast_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in {"WATCH_S": 0.005, "FIRST_RETRY_S": 0.01, "LONGEST_RETRY_S": 0.02}.items():
        monkeypatch.setattr(pools, name, seconds)


class Bench:
    """Merged engines beside a base; `made` are all that were built, `next` makes the one to come."""

    def __init__(self, most: int = 2, free: int = 100) -> None:
        self.free = free
        self.made: list[FakeEngine] = []
        self.next: Callable[[str], FakeEngine] = FakeEngine
        self.base = EnginePool(FakeEngine)
        plan = MemoryPlan({"weights": 60})
        self.merged = MergedEngines(
            self.base, self._make, lambda _: plan, lambda: self.free, self._turns, most=most, reserve=10
        )

    def _make(self, name: str, _: Path) -> Engine:
        self.made.append(self.next(name))
        return self.made[-1]

    def _turns(self) -> Turns:
        return Turns(slots=1, seats=4, turn_s=0, max_waiting=9)

    def state(self, name: str = "a") -> str | None:
        entry = self.merged.find(name)
        return None if entry is None else entry.state


@asynccontextmanager
async def bench(**given: Any) -> AsyncIterator[Bench]:
    made = Bench(**given)
    made.base.open()
    try:
        yield made
    finally:
        await made.merged.close()
        await made.base.close()


class Gated(FakeEngine):
    """Starts when it is let."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.let = asyncio.Event()

    async def start(self) -> None:
        await self.let.wait()
        await super().start()


class Broken(FakeEngine):
    async def start(self) -> None:
        raise RuntimeError("bad weights\nand more")


async def test_it_is_ready_when_it_was_built_and_warmed() -> None:
    async with bench() as at:
        told: list[str] = []
        entry = await at.merged.promote("a", HERE, told.append)
        assert (told[-1], entry.state, at.merged.serves("a"), entry.plan.total) == ("ready", "ready", True, 60)
        assert entry.pool.running() is at.made[0]
        assert entry.since is not None
        with entry.lease():
            assert entry.leases == 1
        assert entry.leases == 0


async def test_a_second_promotion_joins_the_first_and_a_third_changes_nothing() -> None:
    async with bench() as at:
        first, second = await asyncio.gather(at.merged.promote("a", HERE), at.merged.promote("a", HERE))
        assert first is second is await at.merged.promote("a", HERE)
        assert len(at.made) == 1
        with pytest.raises(MergedEngineRefused, match="other merged weights"):
            await at.merged.promote("a", Path("elsewhere"))


async def test_a_build_outlives_whoever_asked_first() -> None:
    async with bench() as at:
        at.next = Gated
        asked = asyncio.create_task(at.merged.promote("a", HERE))
        await until(lambda: at.made)
        asked.cancel()
        await asyncio.wait([asked])
        assert at.state() == "building"
        at.made[0].let.set()  # type: ignore[attr-defined]
        await at.merged.promote("a", HERE)
        assert (at.state(), len(at.made)) == ("ready", 1)


async def test_one_is_built_at_a_time_and_not_before_the_base_engine_is_up() -> None:
    at = Bench()
    at.next = Gated
    building = [asyncio.create_task(at.merged.promote(name, HERE)) for name in ("a", "b")]
    await asyncio.sleep(0.05)
    assert (at.made, at.state("a"), at.state("b")) == ([], "waiting", "waiting")
    at.base.open()
    await until(lambda: at.made)
    await asyncio.sleep(0.05)
    assert (len(at.made), at.state("a"), at.state("b")) == (1, "building", "waiting")
    at.made[0].let.set()  # type: ignore[attr-defined]
    await until(lambda: len(at.made) == 2)
    at.made[1].let.set()  # type: ignore[attr-defined]
    await asyncio.gather(*building)
    await at.merged.close()
    await at.base.close()


async def test_more_than_are_allowed_are_refused() -> None:
    async with bench(most=1) as at:
        await at.merged.promote("a", HERE)
        with pytest.raises(MergedEngineRefused, match="max_merged_engines is 1") as refused:
            await at.merged.promote("b", HERE)
        assert refused.value.code == "too_many_merged_engines"
        await at.merged.demote("a")
        await at.merged.promote("b", HERE)


async def test_what_does_not_fit_is_refused_before_anything_is_built() -> None:
    async with bench(free=69) as at:
        with pytest.raises(MergedEngineRefused, match="weights") as refused:
            await at.merged.promote("a", HERE)
        assert refused.value.code == "engine_does_not_fit"
        assert (at.made, at.state()) == ([], None)


async def test_memory_that_went_while_it_stood_in_line_is_noticed() -> None:
    at = Bench()
    building = asyncio.create_task(at.merged.promote("a", HERE))
    await until(lambda: at.state() == "waiting")
    at.free = 0
    at.base.open()
    with pytest.raises(MergedEngineRefused):
        await building
    assert (at.made, at.state()) == ([], None)
    await at.base.close()


async def test_one_that_does_not_start_leaves_nothing() -> None:
    async with bench() as at:
        at.next = Broken
        with pytest.raises(EngineUnavailable, match=r"did not start: bad weights$") as failed:
            await at.merged.promote("a", HERE)
        assert failed.value.code == "merged_engine_failed"
        assert (len(at.made), at.state()) == (1, None)
        at.next = FakeEngine
        await at.merged.promote("a", HERE)


async def test_one_that_cannot_generate_when_it_is_warmed_does_not_serve() -> None:
    class Dying(FakeEngine):
        async def start(self) -> None:
            await super().start()
            asyncio.get_running_loop().call_later(0.02, self.die)

    async with bench() as at:
        at.next = lambda name: Dying(name, token_s=0.01)
        with pytest.raises(EngineUnavailable, match="did not start"):
            await at.merged.promote("a", HERE)
        assert at.state() is None


async def test_a_lost_one_is_rebuilt_and_warmed_again() -> None:
    async with bench() as at:
        entry = await at.merged.promote("a", HERE)
        at.next = Gated
        at.made[0].die()
        await until(lambda: at.state() == "rebuilding")
        assert at.merged.serves("a")
        with pytest.raises(EngineUnavailable, match="rebuilding"), entry.lease():
            pass
        await until(lambda: len(at.made) == 2)
        at.made[1].let.set()  # type: ignore[attr-defined]
        await until(lambda: at.state() == "ready")
        assert (entry.pool.running(), at.merged.restarts) == (at.made[1], 1)


async def test_rebuilds_are_given_up() -> None:
    async with bench() as at:
        entry = await at.merged.promote("a", HERE)
        at.next = Broken
        at.made[0].die()
        await until(lambda: at.state() == "failed")
        assert not at.merged.serves("a")
        assert str(MOST_FAILURES) in str(entry.pool.reason)
        assert len(at.made) <= 1 + MOST_FAILURES
        at.next = FakeEngine
        assert (await at.merged.promote("a", HERE)).state == "ready", "whoever asks again begins anew"


async def test_no_memory_for_a_rebuild_is_a_rebuild_that_failed() -> None:
    async with bench() as at:
        await at.merged.promote("a", HERE)
        at.free = 0
        at.made[0].die()
        await until(lambda: at.state() == "failed")
        assert len(at.made) == 1


async def test_falling_back_waits_for_those_who_run_there_and_lets_nobody_in() -> None:
    async with bench() as at:
        entry = await at.merged.promote("a", HERE)
        with entry.lease():
            ending = [asyncio.create_task(at.merged.demote("a")) for _ in range(2)]
            await asyncio.sleep(0.02)
            assert (at.state(), at.made[0].dead) == ("draining", False)
            with pytest.raises(EngineUnavailable, match="draining"), entry.lease():
                pass
        await asyncio.gather(*ending)
        assert (at.state(), at.made[0].dead) == (None, True)
        await at.merged.demote("a")


async def test_falling_back_while_it_is_built_ends_the_build() -> None:
    async with bench() as at:
        at.next = Gated
        building = asyncio.create_task(at.merged.promote("a", HERE))
        await until(lambda: at.made)
        await at.merged.demote("a")
        with pytest.raises(EngineUnavailable):
            await building
        assert at.state() is None


async def test_falling_back_before_it_is_built_builds_nothing() -> None:
    at = Bench()
    building = asyncio.create_task(at.merged.promote("a", HERE))
    await until(lambda: at.state() == "waiting")
    await at.merged.demote("a")
    at.base.open()
    with pytest.raises(EngineUnavailable, match="fell back"):
        await building
    assert at.made == []
    await at.base.close()


async def test_a_promotion_during_the_end_of_the_last_one_begins_after_it() -> None:
    async with bench() as at:
        entry = await at.merged.promote("a", HERE)
        with entry.lease():
            ending = asyncio.create_task(at.merged.demote("a"))
            await until(lambda: at.state() == "draining")
            again = asyncio.create_task(at.merged.promote("a", HERE))
            await asyncio.sleep(0.02)
            assert len(at.made) == 1
        await ending
        assert (await again).pool.running() is at.made[1]


async def test_whoever_stops_waiting_by_raising_in_its_report_leaves_the_build_alone() -> None:
    class Enough(Exception):
        pass

    def report(state: str) -> None:
        if state == "building":
            raise Enough

    async with bench() as at:
        at.next = Gated
        with pytest.raises(Enough):
            await at.merged.promote("a", HERE, report)
        assert at.state() == "building"
