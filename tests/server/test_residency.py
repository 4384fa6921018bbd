from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from server.engine.fake import FakeEngine
from server.engine.protocol import AdapterHandle, Generation
from server.errors import AdapterUnavailable, EngineUnavailable, Overloaded
from server.residency import Residency
from tests.server.harness import PATIENCE_S, until

Residing = Callable[..., Residency]


@pytest.fixture
async def engine() -> FakeEngine:
    engine = FakeEngine(capacity=3)
    await engine.start()
    return engine


@pytest.fixture
def residing(engine: FakeEngine) -> Residing:
    return lambda capacity=2, wait_s=PATIENCE_S: Residency(lambda: engine, capacity, wait_s)


@pytest.fixture
def files(tmp_path: Path) -> Callable[[str], Path]:
    """Name → a directory that the fake engine takes for an adapter."""

    def make(name: str) -> Path:
        path = tmp_path / name
        path.mkdir(exist_ok=True)
        (path / "adapter_config.json").write_text("{}")
        return path

    return make


Files = Callable[[str], Path]


async def touch(residency: Residency, files: Files, *names: str) -> None:
    for name in names:
        async with residency.lease(name, files(name)):
            pass


def names(residency: Residency) -> list[str]:
    return sorted(residency.snapshot())


async def held(engine: FakeEngine) -> int:
    return len(await engine.adapter_ids())


async def test_an_adapter_is_loaded_once_and_found_afterwards(
    residing: Residing, files: Files, engine: FakeEngine
) -> None:
    residency = residing()
    await touch(residency, files, "a", "a", "a")
    assert engine.loads == ["a"]
    assert (residency.counters.loads, residency.counters.hits) == (1, 2)


async def test_many_callers_at_once_share_one_load(residing: Residing, files: Files, engine: FakeEngine) -> None:
    engine._load_s = 0.02
    residency = residing()
    together = asyncio.Barrier(20)

    async def use() -> int:
        async with residency.lease("a", files("a")) as handle:
            await together.wait()
            assert residency.snapshot()["a"].leases == 20
            return handle.int_id

    assert await asyncio.gather(*(use() for _ in range(20))) == [1] * 20
    assert engine.loads == ["a"]
    assert residency.snapshot()["a"].leases == 0


async def test_a_load_outlives_the_cancellation_of_its_first_caller(
    residing: Residing, files: Files, engine: FakeEngine
) -> None:
    engine.pause(loads=True)
    residency = residing()
    first = asyncio.create_task(touch(residency, files, "a"))
    second = asyncio.create_task(touch(residency, files, "a"))
    await until(residency.loading)
    first.cancel()
    engine.go_on()
    await second
    assert first.cancelled()
    assert engine.loads == ["a"]


async def test_a_load_that_nobody_waits_for_any_more_leaves_an_idle_adapter(
    residing: Residing, files: Files, engine: FakeEngine
) -> None:
    engine.pause(loads=True)
    residency = residing()
    only = asyncio.create_task(touch(residency, files, "a"))
    await until(residency.loading)
    only.cancel()
    await asyncio.wait([only])
    engine.go_on()
    await until(lambda: not residency.loading())
    assert residency.snapshot()["a"].leases == 0


async def test_a_load_that_has_just_ended_and_left_nothing_is_not_joined(
    residing: Residing, files: Files, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody wants "a" any more, so the end of its load evicts it; who asks in that very turn must load it again."""
    engine._load_s = 0.02
    residency = residing(capacity=1)
    add = engine.add_adapter
    late: list[asyncio.Task[None]] = []

    async def add_and_be_asked(handle: AdapterHandle) -> None:
        await add(handle)
        if not late:
            late.append(asyncio.create_task(touch(residency, files, "a")))

    async with residency.lease("b", files("b")):
        monkeypatch.setattr(engine, "add_adapter", add_and_be_asked)
        early = asyncio.create_task(touch(residency, files, "a"))
        await until(residency.loading)
        early.cancel()
        await until(lambda: late)
        await late[0]
        assert engine.loads == ["b", "a", "a"]


async def test_a_cancelled_user_gives_the_lease_back(residing: Residing, files: Files) -> None:
    residency = residing()

    async def use() -> None:
        async with residency.lease("a", files("a")):
            await asyncio.Event().wait()

    task = asyncio.create_task(use())
    await until(lambda: "a" in residency.snapshot() and residency.snapshot()["a"].leases)
    task.cancel()
    await until(lambda: residency.snapshot()["a"].leases == 0)


async def test_a_user_that_fails_gives_the_lease_back(residing: Residing, files: Files) -> None:
    residency = residing()
    with pytest.raises(ZeroDivisionError):
        async with residency.lease("a", files("a")):
            raise ZeroDivisionError
    assert residency.snapshot()["a"].leases == 0


async def test_an_expected_adapter_is_loaded_before_it_is_leased(
    residing: Residing, files: Files, engine: FakeEngine
) -> None:
    residency = residing()
    with residency.expected("a", files("a")), residency.expected("a", files("a")):
        await until(lambda: names(residency) == ["a"])
        async with residency.lease("a", files("a")):
            assert engine.loads == ["a"]


async def test_expecting_evicts_who_is_idle_but_nobody_who_is_used_or_expected_too(
    residing: Residing, files: Files, engine: FakeEngine
) -> None:
    residency = residing(capacity=2)
    await touch(residency, files, "idle", "b")
    async with residency.lease("b", files("b")):
        with residency.expected("a", files("a")):
            await until(lambda: names(residency) == ["a", "b"])
            with residency.expected("c", files("c")):
                await asyncio.sleep(0.02)
                assert names(residency) == ["a", "b"]


async def test_expecting_does_not_stand_in_the_way_of_a_lease(residing: Residing, files: Files) -> None:
    residency = residing(capacity=1)
    with residency.expected("a", files("a")):
        await until(lambda: names(residency) == ["a"])
        async with residency.lease("b", files("b")), residency.lease("c", files("c")):
            assert names(residency) == ["b", "c"]


async def test_expected_adapters_are_evicted_last(residing: Residing, files: Files) -> None:
    residency = residing(capacity=2)
    await touch(residency, files, "older", "newer")
    with residency.expected("older", files("older")):
        await touch(residency, files, "another")
        assert names(residency) == ["another", "older"]


async def test_an_expected_adapter_that_the_engine_refuses_is_an_error_of_its_lease_only(
    residing: Residing, tmp_path: Path
) -> None:
    residency = residing()
    (tmp_path / "bad").mkdir()
    with residency.expected("bad", tmp_path / "bad"):
        await until(lambda: residency.counters.failures == 1)
    with pytest.raises(AdapterUnavailable):
        async with residency.lease("bad", tmp_path / "bad"):
            pass


async def test_idle_adapters_stay_up_to_the_capacity(residing: Residing, files: Files, engine: FakeEngine) -> None:
    residency = residing(capacity=2)
    await touch(residency, files, "a", "b")
    assert names(residency) == ["a", "b"]
    await touch(residency, files, "c")
    assert names(residency) == ["b", "c"]
    assert await held(engine) == 2
    assert residency.counters.evictions == 1


async def test_the_least_recently_used_goes_first(residing: Residing, files: Files) -> None:
    residency = residing(capacity=2)
    await touch(residency, files, "a", "b", "a", "c")
    assert names(residency) == ["a", "c"]


async def test_a_lease_counts_as_use_until_it_ends(residing: Residing, files: Files) -> None:
    residency = residing(capacity=2)
    async with residency.lease("a", files("a")):
        await touch(residency, files, "b")
    await touch(residency, files, "c")
    assert names(residency) == ["a", "c"]


async def test_the_spare_place_serves_one_more_while_all_are_leased(
    residing: Residing, files: Files, engine: FakeEngine
) -> None:
    residency = residing(capacity=2)
    async with AsyncExitStack() as leases:
        for name in ("a", "b", "c"):
            await leases.enter_async_context(residency.lease(name, files(name)))
        assert await held(engine) == 3
    await touch(residency, files, "d")
    assert names(residency) == ["a", "d"]  # "a" was given back last


async def test_a_leased_adapter_is_never_removed(residing: Residing, files: Files, engine: FakeEngine) -> None:
    residency = residing(capacity=1)
    async with residency.lease("a", files("a")) as handle:
        await touch(residency, files, *"bcdef")
        assert handle.int_id in await engine.adapter_ids()
        assert residency.snapshot()["a"].handle == handle


async def test_every_load_has_a_fresh_id(residing: Residing, files: Files) -> None:
    residency = residing(capacity=1)
    seen = []
    for name in "abab":
        async with residency.lease(name, files(name)) as handle:
            seen.append(handle.int_id)
    assert seen == [1, 2, 3, 4]


async def test_who_finds_no_room_waits_for_the_first_that_is_given_back(residing: Residing, files: Files) -> None:
    residency = residing(capacity=1)
    async with residency.lease("a", files("a")):
        async with residency.lease("b", files("b")):
            third = asyncio.create_task(touch(residency, files, "c"))
            await asyncio.sleep(0.02)
            assert not third.done()
        await third
        assert names(residency) == ["a", "c"]


async def test_who_waits_for_room_hears_that_another_lost_interest(
    residing: Residing, files: Files, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Just loaded and still wanted, "a" is not idle; it becomes so by a cancellation, not by a lease's end."""
    engine._load_s = 0.01
    residency = residing(capacity=1)
    add = engine.add_adapter

    async def add_and_lose_interest(handle: AdapterHandle) -> None:
        await add(handle)
        if handle.name == "a":
            asyncio.get_running_loop().call_soon(first.cancel)

    async with residency.lease("b", files("b")):
        monkeypatch.setattr(engine, "add_adapter", add_and_lose_interest)
        first = asyncio.create_task(touch(residency, files, "a"))
        second = asyncio.create_task(touch(residency, files, "c"))
        await asyncio.wait_for(second, PATIENCE_S)
        assert first.cancelled()
        assert names(residency) == ["b", "c"]


async def test_who_finds_no_room_in_time_is_told_to_come_back(
    residing: Residing, files: Files, engine: FakeEngine
) -> None:
    residency = residing(capacity=1, wait_s=0.05)
    async with residency.lease("a", files("a")), residency.lease("b", files("b")):
        with pytest.raises(Overloaded, match=r"no room for adapter c within 0\.05 s"):
            await touch(residency, files, "c")
        behind = await asyncio.gather(*(touch(residency, files, name) for name in "de"), return_exceptions=True)
        assert [type(each) for each in behind] == [Overloaded] * 2, "waiting behind another load is waiting, too"
        assert await held(engine) == 2
        assert residency.counters.failures == 0
    residency._wait_s = PATIENCE_S
    await touch(residency, files, "c")


async def test_who_joins_a_load_late_has_the_same_patience(residing: Residing, files: Files) -> None:
    residency = residing(capacity=1)
    async with residency.lease("a", files("a")):
        async with residency.lease("b", files("b")):
            residency._wait_s = 0.1
            early = asyncio.create_task(touch(residency, files, "c"))
            await until(residency.loading)
            residency._wait_s = PATIENCE_S  # what it has left when that of the first is over
            late = asyncio.create_task(touch(residency, files, "c"))
            with pytest.raises(Overloaded):
                await early
        await late


async def test_a_refused_adapter_leaves_the_good_ones_and_nothing_of_itself(
    residing: Residing, files: Files, engine: FakeEngine, tmp_path: Path
) -> None:
    residency = residing(capacity=2)
    await touch(residency, files, "a", "b")
    before = await engine.adapter_ids()
    (tmp_path / "bad").mkdir()
    with pytest.raises(AdapterUnavailable, match="the engine refused adapter bad") as refused:
        async with residency.lease("bad", tmp_path / "bad"):
            pass
    assert refused.value.code == "adapter_refused"
    assert str(tmp_path) not in refused.value.message
    assert await engine.adapter_ids() == before
    assert names(residency) == ["a", "b"]
    assert (residency.counters.failures, residency.counters.evictions) == (1, 0)


async def test_everyone_who_waits_for_a_refused_adapter_is_told(
    residing: Residing, engine: FakeEngine, tmp_path: Path
) -> None:
    engine._load_s = 0.02
    (tmp_path / "bad").mkdir()
    residency = residing()
    results = await asyncio.gather(
        *(touch(residency, lambda _: tmp_path / "bad", "bad") for _ in range(5)), return_exceptions=True
    )
    assert [type(result) for result in results] == [AdapterUnavailable] * 5
    assert engine.loads == ["bad"]


async def test_files_that_are_gone_refuse_the_adapter(residing: Residing, tmp_path: Path) -> None:
    with pytest.raises(AdapterUnavailable):
        async with residing().lease("gone", tmp_path / "gone"):
            pass


async def test_an_adapter_that_was_repaired_can_be_loaded(residing: Residing, files: Files, tmp_path: Path) -> None:
    residency = residing()
    (tmp_path / "a").mkdir()
    with pytest.raises(AdapterUnavailable):
        async with residency.lease("a", tmp_path / "a"):
            pass
    await touch(residency, files, "a")
    assert names(residency) == ["a"]


async def test_retiring_refuses_new_leases_and_waits_for_old_ones(
    residing: Residing, files: Files, engine: FakeEngine
) -> None:
    residency = residing()
    gone = asyncio.Event()

    async def retire() -> None:
        async with residency.retiring("a"):
            assert await held(engine) == 0
            gone.set()

    async with residency.lease("a", files("a")):
        retiring = asyncio.create_task(retire())
        await asyncio.sleep(0.02)
        with pytest.raises(AdapterUnavailable) as refused:
            await touch(residency, files, "a")
        assert refused.value.code == "adapter_draining"
        assert not gone.is_set()
        assert await held(engine) == 1
    await retiring
    assert gone.is_set()


async def test_retiring_waits_for_a_load_that_is_under_way(
    residing: Residing, files: Files, engine: FakeEngine
) -> None:
    engine.pause(loads=True)
    residency = residing()
    user = asyncio.create_task(touch(residency, files, "a"))
    await until(residency.loading)
    asyncio.get_running_loop().call_soon(engine.go_on)  # when `retiring` waits
    async with residency.retiring("a"):
        assert residency.loading() == []
        assert await held(engine) == 0
    with pytest.raises(AdapterUnavailable):
        await user


async def test_two_may_retire_the_same_adapter(residing: Residing, files: Files) -> None:
    residency = residing()
    await touch(residency, files, "a")
    async with residency.retiring("a"):
        async with residency.retiring("a"):
            pass
        with pytest.raises(AdapterUnavailable):
            await touch(residency, files, "a")
    await touch(residency, files, "a")


async def test_what_is_retired_without_being_resident_is_gone_at_once(residing: Residing) -> None:
    residency = residing()
    async with residency.retiring("never seen"):
        assert residency.snapshot() == {}


async def test_a_lost_engine_takes_all_adapters_along(residing: Residing, files: Files, engine: FakeEngine) -> None:
    residency = residing()
    async with residency.lease("a", files("a")):
        engine.die()
        residency.forget_all()
        assert residency.snapshot() == {}
        await engine.start()
        await touch(residency, files, "a")
        assert residency.snapshot()["a"].leases == 0
    assert residency.snapshot()["a"].leases == 0, "a lease on the lost engine must not count on the new one"


async def test_an_engine_lost_during_a_load_is_an_error_and_leaves_nothing(
    residing: Residing, files: Files, engine: FakeEngine
) -> None:
    engine.pause(loads=True)
    residency = residing()
    user = asyncio.create_task(touch(residency, files, "a"))
    await until(lambda: engine.loads)  # it is in the engine's hands
    engine.die()
    residency.forget_all()
    with pytest.raises(EngineUnavailable):
        await user
    assert residency.snapshot() == {}


async def test_an_engine_rebuilt_before_the_load_reached_it_holds_nothing_that_residency_does_not_know(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines = [FakeEngine(), FakeEngine()]
    for engine in engines:
        await engine.start()
    residency = Residency(lambda: engines[0], 2, PATIENCE_S)
    reading, may_go_on = asyncio.Event(), asyncio.Event()

    async def slow_disk(*_: object) -> None:
        reading.set()
        await may_go_on.wait()

    monkeypatch.setattr(asyncio, "to_thread", slow_disk)
    user = asyncio.create_task(touch(residency, files, "a"))
    await reading.wait()
    engines.pop(0).die()
    residency.forget_all()
    may_go_on.set()
    await user
    assert await engines[0].adapter_ids() == {entry.handle.int_id for entry in residency.snapshot().values()} == {1}


async def test_who_waits_for_room_goes_on_when_the_engine_was_rebuilt(
    residing: Residing, files: Files, engine: FakeEngine
) -> None:
    residency = residing(capacity=1)
    async with residency.lease("a", files("a")), residency.lease("b", files("b")):
        waiting = asyncio.create_task(touch(residency, files, "c"))
        await asyncio.sleep(0.02)
        await engine.start()
        residency.forget_all()
        await asyncio.wait_for(waiting, PATIENCE_S)


async def test_without_an_engine_a_lease_fails_and_the_next_one_works(files: Files, engine: FakeEngine) -> None:
    there = False

    def running() -> FakeEngine:
        if not there:
            raise EngineUnavailable("the engine is starting")
        return engine

    residency = Residency(running, 2, PATIENCE_S)
    with pytest.raises(EngineUnavailable):
        await touch(residency, files, "a")
    there = True
    await touch(residency, files, "a")


class StrictEngine(FakeEngine):
    """Notes it when it is given more than it can hold, or told to drop what is in use."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity=capacity)
        self.most = 0
        self.in_use: Counter[int] = Counter()
        self.complaints: list[str] = []

    async def add_adapter(self, handle: AdapterHandle) -> None:
        await asyncio.sleep(random.random() / 500)
        if len(self._held) >= self._capacity:
            self.complaints.append(f"no place for {handle}")
        await super().add_adapter(handle)
        self.most = max(self.most, len(self._held))

    async def remove_adapter(self, handle: AdapterHandle) -> None:
        if self.in_use[handle.int_id]:
            self.complaints.append(f"{handle} is in use")
        await asyncio.sleep(random.random() / 500)
        await super().remove_adapter(handle)


@pytest.mark.parametrize("seed", range(4))
async def test_random_traffic_breaks_no_rule(seed: int, files: Files, tmp_path: Path) -> None:
    """40 users, 15 requests each, 9 adapters (one is bad) on 3 places and a spare one; some leave, some retire."""
    chance = random.Random(seed)
    engine = StrictEngine(capacity=4)
    await engine.start()
    residency = Residency(lambda: engine, 3, PATIENCE_S)
    (tmp_path / "bad").mkdir()
    paths = {name: files(name) for name in "abcdefgh"} | {"bad": tmp_path / "bad"}
    answered, refusals = 0, []

    async def use(name: str) -> None:
        nonlocal answered
        if chance.random() < 0.5:
            with residency.expected(name, paths[name]):
                await asyncio.sleep(chance.random() / 100)
        async with residency.lease(name, paths[name]) as handle:
            assert handle.name == name
            engine.in_use[handle.int_id] += 1
            try:
                body = {"prompt": "one two three"}
                async with engine.generate(Generation("completions", body, "id", name, handle)) as answer:
                    await asyncio.sleep(chance.random() / 200)
                    assert answer.body is not None
                    assert answer.body["choices"][0]["text"] == f"[{name}] one two three"
            finally:
                engine.in_use[handle.int_id] -= 1
            answered += 1

    async def impatient(name: str) -> None:
        task = asyncio.create_task(use(name))
        await asyncio.sleep(chance.random() / 50)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    async def retire(name: str) -> None:
        async with residency.retiring(name):
            assert name not in residency.snapshot()

    async def user() -> None:
        for _ in range(15):
            name = chance.choice(list(paths))
            kind = chance.choices([use, impatient, retire], [12, 6, 1])[0]
            try:
                await kind(name)
            except AdapterUnavailable as refused:
                refusals.append((name, refused.code))

    await asyncio.gather(*(user() for _ in range(40)))
    await until(lambda: not residency.loading())  # loads outlive those who asked for them
    assert not engine.dead, "a generation ran on an adapter that was not resident"
    assert engine.complaints == []
    assert engine.most == 4, "the traffic never used the spare place: it proves nothing"
    assert answered > 80
    assert all(code == "adapter_draining" or name == "bad" for name, code in refusals)
    assert len(residency.snapshot()) <= 4
    assert all(entry.leases == 0 for entry in residency.snapshot().values())
    assert await engine.adapter_ids() == {entry.handle.int_id for entry in residency.snapshot().values()}
    assert not residency._wanted
    assert not residency._retiring


async def test_a_load_that_has_ended_is_not_awaited_again(residing: Residing, files: Files) -> None:
    """Awaiting it never yields, so the callback that clears it would never run: the whole server would stand still."""
    residency = residing()
    ended = asyncio.create_task(asyncio.sleep(0))
    await ended
    residency._loads["a"] = ended
    async with asyncio.timeout(PATIENCE_S), residency.lease("a", files("a")) as handle:
        assert handle.name == "a"


async def test_in_use_is_what_requests_hold_or_wait_for(residing: Residing, files: Files) -> None:
    residency = residing()
    await touch(residency, files, "idle")
    assert residency.in_use() == set()
    async with residency.lease("leased", files("leased")):
        with residency.expected("expected", files("expected")):
            assert residency.in_use() == {"leased", "expected"}
        assert "leased" in residency.in_use()
    await until(lambda: not residency.loading())
    assert residency.in_use() == set()
