from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from server.engine import pool as pools
from server.engine.fake import FakeEngine
from server.engine.pool import EnginePool, prove
from server.engine.protocol import Answer, Engine, Stats
from server.errors import EngineUnavailable
from tests.server.harness import PATIENCE_S, until


class BrokenEngine(FakeEngine):
    async def start(self) -> None:
        raise RuntimeError("no memory\nand a long explanation")


class MuteEngine(FakeEngine):
    """Starts, but answers every generation with an error."""

    def generate(self, generation: Any) -> Any:
        class Refusing:
            async def __aenter__(self) -> Answer:
                return Answer(Stats(), 500, {"error": "mute"})

            async def __aexit__(self, *_: object) -> None:
                return None

        return Refusing()


@pytest.fixture(autouse=True)
def _fast_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "WATCH_S", 0.005)
    monkeypatch.setattr(pools, "FIRST_RETRY_S", 0.01)
    monkeypatch.setattr(pools, "LONGEST_RETRY_S", 0.02)


@pytest.fixture
async def opened() -> AsyncIterator[Callable[..., EnginePool]]:
    pools_: list[EnginePool] = []

    def open_pool(*engines: Engine, on_loss: Callable[[], None] = lambda: None) -> EnginePool:
        """A pool that builds these engines in turn, the last one again and again."""
        left = list(engines)
        pool = EnginePool(lambda: left.pop(0) if len(left) > 1 else left[0], on_loss)
        pools_.append(pool)
        pool.open()
        return pool

    yield open_pool
    for pool in pools_:
        await pool.close()


Opened = Callable[..., EnginePool]


async def test_it_is_ready_when_the_engine_has_generated_a_token(opened: Opened) -> None:
    engine = FakeEngine()
    pool = opened(engine)
    assert pool.state == "starting"
    with pytest.raises(EngineUnavailable, match="the engine is starting"):
        pool.running()
    assert await pool.ready() is engine
    assert (pool.state, pool.running(), pool.never_started, pool.restarts) == ("ready", engine, False, 0)


async def test_an_engine_that_starts_but_cannot_generate_is_not_ready(opened: Opened) -> None:
    pool = opened(MuteEngine(), FakeEngine())
    with pytest.raises(EngineUnavailable, match="could not generate"):
        await pool.ready()
    await until(lambda: pool.state == "ready")


async def test_a_lost_engine_is_rebuilt(opened: Opened) -> None:
    first, second = FakeEngine(), FakeEngine()
    losses: list[str] = []
    pool: EnginePool = opened(first, second, on_loss=lambda: losses.append(pool.state))
    await pool.ready()
    first.die()
    await until(lambda: pool.state == "restarting")
    with pytest.raises(EngineUnavailable, match="the engine is restarting"):
        pool.running()
    assert await pool.ready() is second
    assert (pool.restarts, losses) == (1, ["restarting"])


async def test_a_rebuild_is_tried_until_it_works(opened: Opened) -> None:
    first, last = FakeEngine(), FakeEngine()
    pool = opened(first, BrokenEngine(), BrokenEngine(), last)
    await pool.ready()
    first.die()
    await until(lambda: pool.state == "failed")
    await until(lambda: pool.state == "ready")
    assert pool.running() is last
    assert pool.restarts == 1


async def test_a_failed_start_says_why_in_one_line(opened: Opened) -> None:
    pool = opened(BrokenEngine(), FakeEngine())
    with pytest.raises(EngineUnavailable, match=r"the engine is failed \(no memory\); try again shortly$"):
        await pool.ready()


async def test_a_first_start_that_fails_is_reported_instead_of_retried() -> None:
    built = []
    pool = EnginePool(lambda: built.append(1) or BrokenEngine())  # type: ignore[func-returns-value]
    called = asyncio.Event()
    pool.on_first_failure = called.set
    pool.open()
    await asyncio.wait_for(called.wait(), PATIENCE_S)
    await asyncio.sleep(0.05)
    assert (len(built), pool.never_started, pool.state) == (1, True, "failed")
    await pool.close()


async def test_a_later_failure_is_retried_even_with_that_callback(opened: Opened) -> None:
    first = FakeEngine()
    pool = opened(first, BrokenEngine(), FakeEngine())
    pool.on_first_failure = lambda: pytest.fail("this was not the first start")
    await pool.ready()
    first.die()
    await until(lambda: pool.state == "failed")
    await until(lambda: pool.state == "ready")


async def test_who_counts_failures_gives_up() -> None:
    pool = EnginePool(BrokenEngine, most_failures=2)
    pool.open()
    await until(lambda: pool.has_given_up)
    assert (pool.state, pool.reason) == ("failed", "2 times in a row it did not start or died at once")
    await pool.close()


async def test_an_engine_that_dies_at_once_counts_as_one_that_did_not_start() -> None:
    engines: list[FakeEngine] = []

    def build() -> FakeEngine:
        engines.append(FakeEngine())
        return engines[-1]

    pool = EnginePool(build, most_failures=2)
    pool.open()
    for number in (1, 2):
        await until(lambda number=number: pool.state == "ready" and len(engines) == number)
        engines[-1].die()
    await until(lambda: pool.has_given_up)
    assert (len(engines), pool.restarts) == (2, 2)
    await pool.close()


async def test_an_engine_is_ready_when_it_has_passed_the_proof_it_was_given() -> None:
    asked: list[Engine] = []

    async def proof(engine: Engine) -> None:
        asked.append(engine)
        if len(asked) == 1:
            raise EngineUnavailable("not good enough")

    pool = EnginePool(FakeEngine, proof=proof)
    pool.open()
    await until(lambda: pool.state == "ready")
    assert (len(asked), pool.running()) == (2, asked[1])
    await pool.close()


async def test_closing_stops_the_engine(opened: Opened) -> None:
    engine = FakeEngine()
    pool = opened(engine)
    await pool.ready()
    await pool.close()
    assert engine.dead
    assert pool.state == "stopped"
    with pytest.raises(EngineUnavailable, match="stopped"):
        await pool.ready()


async def test_closing_during_the_start_wakes_who_waits(opened: Opened) -> None:
    class SlowEngine(FakeEngine):
        async def start(self) -> None:
            await asyncio.Event().wait()

    pool = opened(SlowEngine())
    waiting = asyncio.create_task(pool.ready())
    await asyncio.sleep(0.01)
    await pool.close()
    with pytest.raises(EngineUnavailable, match="stopped"):
        await asyncio.wait_for(waiting, PATIENCE_S)


async def test_closing_what_was_never_opened() -> None:
    pool = EnginePool(FakeEngine)
    await pool.close()
    assert pool.state == "stopped"


async def test_an_engine_that_does_not_stop_cleanly_is_replaced_all_the_same(opened: Opened) -> None:
    class ClingingEngine(FakeEngine):
        async def stop(self) -> None:
            raise RuntimeError("still here")

    first, second = ClingingEngine(), FakeEngine()
    pool = opened(first, second)
    await pool.ready()
    first.die()
    await until(lambda: pool.state == "restarting")
    assert await pool.ready() is second


async def test_the_proof_is_one_token() -> None:
    engine = FakeEngine()
    await engine.start()
    await prove(engine)
    assert engine.running == 0
    engine.die()
    with pytest.raises(EngineUnavailable):
        await prove(engine)
