"""Aliases and versions that only a merged engine can serve: rolled out, tried on some, rolled back, and found again
after a restart, on whole servers with fake engines."""

from __future__ import annotations

import asyncio
import io
import json
from pathlib import Path
from typing import Any

import pytest

from adapters.records import MERGE_ONLY
from server import merging
from server.engine import pool as pools
from server.engine.fake import FakeEngine
from tests.server.harness import PATIENCE_S, Exchange, World, chat, ingest, until, world

ADAPTER = "/v1/adapters/a"
DEFAULT = f"{ADAPTER}/aliases/default"
JOB_S = PATIENCE_S


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "WORKER", "tests.server.stand_in_merger")
    monkeypatch.setattr(pools, "WATCH_S", 0.01)
    monkeypatch.setattr(pools, "FIRST_RETRY_S", 0.01)


@pytest.fixture
def built(tiny_base: Path, tmp_path: Path) -> World:
    return stocked(standing(tiny_base, tmp_path / "data"))


def stocked(made: World) -> World:
    """`a@1` is ready and what `default` serves, `a@2` and `a@3` are merge only."""
    for seed in (1, 2, 3):
        ingest(made, "a", seed)
    made.services.registry.set_alias("a", "default", 1)
    for number in (2, 3):
        made.services.registry.set_state("a", number, MERGE_ONLY, "DoRA")
    return made


def standing(base: Path, data_dir: Path, **more: Any) -> World:
    return world(base, data_dir, quantization="none", memory_reserve_bytes=0, max_merged_engines=2, **more)


async def ask(built: World, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    exchange = Exchange(built.app, path, {} if body is None else body, method)
    await exchange.start()
    return exchange.status, json.loads(exchange.text)


async def put(built: World, **target: Any) -> tuple[int, Any]:
    return await ask(built, "PUT", DEFAULT, target)


async def served(built: World, model: str = "a", user: str | None = None) -> str:
    """Version and way, or status and code."""
    exchange = Exchange(built.app, "/v1/chat/completions", chat(model, **({"user": user} if user else {})))
    await exchange.start()
    headers: dict[bytes, bytes] = dict(exchange.messages[0]["headers"])
    if exchange.status == 200:
        return f"{headers[b'x-loraplex-version'].decode()} {headers[b'x-loraplex-path'].decode()}"
    if exchange.status == 503:
        assert int(headers[b"retry-after"]) > 0
    return f"{exchange.status} {json.loads(exchange.text)['error']['code']}"


def name_of(built: World, number: int) -> str:
    return f"a@{built.services.registry.resolve('a', str(number)).digest[7:19]}"


async def build(built: World, number: int) -> None:
    await built.services.merged.promote(name_of(built, number), built.services.base.path)


async def test_an_alias_moves_there_while_its_engine_is_ready_and_back(built: World) -> None:
    async with built.running():
        status, refused = await put(built, version=2)
        assert (status, refused["error"]["code"]) == (409, "needs_merged_engine")
        assert "PUT /v1/adapters/a/versions/2/merged" in refused["error"]["message"]
        assert await served(built) == "1 lora"

        await build(built, 2)
        status, moved = await put(built, version=2)
        assert (status, moved["aliases"]) == (200, {"default": 2})
        assert await served(built) == "2 merged"
        _, models = await ask(built, "GET", "/v1/models")
        assert [(each["id"], each["root"]) for each in models["data"][1:]] == [("a", "registry://a@2")]

        assert (await ask(built, "POST", f"{ADAPTER}/rollback"))[1]["aliases"] == {"default": 1}
        assert await served(built) == "1 lora"


async def test_a_rollback_to_one_needs_its_engine(built: World) -> None:
    async with built.running():
        await build(built, 2)
        await put(built, version=2)
        await put(built, version=1)
        await ask(built, "DELETE", f"{ADAPTER}/versions/2/merged")
        status, refused = await ask(built, "POST", f"{ADAPTER}/rollback")
        assert (status, refused["error"]["code"]) == (409, "needs_merged_engine")
        assert "then roll back the alias 'default'" in refused["error"]["message"]
        assert await served(built) == "1 lora"
        await build(built, 2)
        assert (await ask(built, "POST", f"{ADAPTER}/rollback"))[0] == 200
        assert await served(built) == "2 merged"


async def test_a_canary_gets_its_share_while_its_engine_answers(built: World) -> None:
    async with built.running():
        assert (await put(built, split={"1": 50, "2": 50}))[0] == 409
        await build(built, 2)
        assert (await put(built, split={"1": 50, "2": 50}))[0] == 200
        users = [f"user-{number}" for number in range(12)]
        first = {user: await served(built, user=user) for user in users}
        assert set(first.values()) == {"1 lora", "2 merged"}
        assert {user: await served(built, user=user) for user in users} == first, "a user stays where they are"
        await ask(built, "DELETE", f"{ADAPTER}/versions/2/merged?force=true")
        assert {await served(built, user=user) for user in users} == {"1 lora"}, "nobody hears of it"


async def test_an_engine_that_an_alias_needs_goes_only_when_forced(built: World) -> None:
    async with built.running():
        await build(built, 2)
        await put(built, version=2)
        status, refused = await ask(built, "DELETE", f"{ADAPTER}/versions/2/merged")
        assert (status, refused["error"]["code"]) == (409, "version_in_use")
        assert "the alias default serves" in refused["error"]["message"]
        assert await served(built) == "2 merged"
        assert (await ask(built, "DELETE", f"{ADAPTER}/versions/2/merged?force=true"))[1]["ended"]
        assert await served(built) == "503 no_merged_engine"
        assert await served(built, "a@2") == "409 adapter_merge_only"
        await build(built, 2)
        assert await served(built) == "2 merged"


async def test_one_that_is_ready_loses_its_engine_whoever_points_there(built: World) -> None:
    async with built.running():
        await build(built, 1)
        assert await served(built) == "1 merged"
        assert (await ask(built, "DELETE", f"{ADAPTER}/versions/1/merged"))[0] == 200
        assert await served(built) == "1 lora"


async def test_while_its_engine_is_away_requests_are_told_to_come_again(
    built: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    let = asyncio.Event()

    class Broken(FakeEngine):
        async def start(self) -> None:
            await let.wait()
            raise RuntimeError("no such kernel")

    async with built.running():
        await build(built, 2)
        await put(built, version=2)
        monkeypatch.setattr(World, "_make_merged", lambda self, name, _: Broken(name))
        built.merged[0].die()
        engine = built.services.merged.snapshot()[name_of(built, 2)]
        await until(lambda: engine.state == "rebuilding")
        assert await served(built) == "503 engine_unavailable"
        let.set()
        await until(lambda: engine.state == "failed")
        assert await served(built) == "503 no_merged_engine"
        _, body = await ask(built, "POST", "/v1/chat/completions", chat("a"))
        assert "its engine was given up: 3 times in a row" in body["error"]["message"]


async def test_no_alias_moves_to_an_engine_that_is_going(built: World) -> None:
    async with built.running():
        await build(built, 2)
        for _ in range(5):
            going = asyncio.create_task(ask(built, "DELETE", f"{ADAPTER}/versions/2/merged"))
            moving = asyncio.create_task(put(built, version=2))
            (gone, _), (moved, _) = await asyncio.gather(going, moving)
            assert sorted([gone, moved]) == [200, 409]
            await put(built, version=1)
            await build(built, 2)


async def test_it_is_built_again_at_the_next_start_as_it_was_asked_for(
    built: World, tiny_base: Path, tmp_path: Path
) -> None:
    kl = tmp_path / "data" / "control" / "kl"
    kl.parent.mkdir()
    kl.write_text("0.5")  # above the budget: only whoever accepts the loss gets an engine
    file = built.services.files.create(io.BytesIO(b"my rows"), "rows.jsonl", "fine-tune").id
    wish = {"base": "original", "accept_loss": True, "validation_file": file}
    async with built.running():
        _, job = await ask(built, "PUT", f"{ADAPTER}/versions/2/merged", wish)
        await built.services.runner.ended(job["id"], JOB_S)
        assert (await put(built, version=2))[0] == 200
    hold = kl.with_name("hold")
    hold.touch()
    again = standing(tiny_base, tmp_path / "data")
    async with again.running():
        assert await served(again) == "503 engine_unavailable"
        assert await served(again, "a@2") == "503 engine_unavailable"
        _, body = await ask(again, "POST", "/v1/chat/completions", chat("a"))
        (job,) = again.services.jobs.jobs(state="running") or again.services.jobs.jobs(state="queued")
        assert f"still to be built by {job.id}" in body["error"]["message"]
        assert {key: job.params[key] for key in wish} == wish
        hold.unlink()
        await again.services.runner.ended(job.id, JOB_S)
        assert await served(again) == "2 merged"


async def test_latest_is_never_one_that_needs_an_engine(built: World) -> None:
    async with built.running():
        await build(built, 3)
        assert await served(built, "a@latest") == "1 lora"
        assert await served(built, "a@3") == "3 merged"


async def test_two_servers_on_one_registry_answer_for_their_own_engines(tiny_base: Path, tmp_path: Path) -> None:
    shared = {"database_url": f"sqlite:///{tmp_path}/r.db", "store_url": f"file://{tmp_path}/bucket"}
    built = stocked(standing(tiny_base, tmp_path / "one", **shared))
    other = standing(tiny_base, tmp_path / "other", **shared)
    async with built.running(), other.running():
        await build(built, 2)
        assert (await put(other, version=2))[1]["error"]["code"] == "needs_merged_engine"
        assert (await put(built, version=2))[0] == 200
        assert await served(built) == "2 merged"
        assert await served(other) == "503 no_merged_engine"
        assert (await ask(other, "DELETE", f"{ADAPTER}/versions/2/merged"))[1]["error"]["code"] == "version_in_use"
