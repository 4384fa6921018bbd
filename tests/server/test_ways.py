"""Requests and merged engines: who goes where, and what happens when the engine dies, on a whole server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from adapters.records import MERGE_ONLY
from server.engine import pool as pools
from server.engine.fake import FakeEngine
from server.engine.protocol import Answer, Generation, Stats
from tests.server.harness import PATIENCE_S, Exchange, World, chat, events, ingest, said, until, world

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
LONG = " ".join(f"w{number}" for number in range(30))


@pytest.fixture(autouse=True)
def _fast_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "WATCH_S", 0.01)
    monkeypatch.setattr(pools, "FIRST_RETRY_S", 0.01)


@asynccontextmanager
async def promoted(base: Path, data_dir: Path, **settings: Any) -> AsyncIterator[tuple[World, str]]:
    """A server with the adapter `a`, whose version has a merged engine; and its engine name."""
    built = world(base, data_dir, **{"memory_reserve_bytes": 0, **settings})
    name = ingest(built, "a")
    async with built.running():
        await built.services.merged.promote(name, base)
        yield built, name


async def ask(built: World, body: dict[str, Any], path: str = CHAT, method: str = "POST") -> Exchange:
    exchange = Exchange(built.app, path, body, method)
    await exchange.start()
    return exchange


async def page(built: World, path: str) -> Any:
    return json.loads((await ask(built, {}, path, "GET")).text)


def header(exchange: Exchange, name: str) -> str:
    headers: dict[bytes, bytes] = dict(exchange.messages[0]["headers"])
    return headers[name.encode()].decode()


def way(exchange: Exchange) -> str:
    return header(exchange, "x-loraplex-path")


async def metric(built: World, line: str) -> bool:
    return line in (await ask(built, {}, "/metrics", "GET")).text.splitlines()


def text_of(exchange: Exchange) -> str:
    *chunks, done = events(exchange.text)
    assert done == "[DONE]", exchange.text
    assert all("error" not in chunk for chunk in chunks), exchange.text
    assert len({chunk["id"] for chunk in chunks}) == 1
    choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
    assert [choice["finish_reason"] for choice in choices[:-1]] == [None] * (len(choices) - 1)
    assert choices[-1]["finish_reason"] == "stop"
    return "".join(choice["delta"]["content"] if "delta" in choice else choice["text"] for choice in choices)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_goes_to_the_engine_of_its_version(tiny_base: Path, tmp_path: Path, stream: bool) -> None:
    async with promoted(tiny_base, tmp_path / "data") as (built, name):
        answer = await ask(built, chat("a@1", stream=stream))
        assert (answer.status, way(answer), header(answer, "x-loraplex-version")) == (200, "merged", "1")
        assert built.engine.loads == [], "nothing was loaded into the base engine"
        assert built.services.residency.snapshot() == {}
        told = text_of(answer) if stream else said(json.loads(answer.text)) + " "
        assert told == f"[{name}] one two three "
        assert way(await ask(built, chat())) == "base"
        assert built.services.merged.snapshot()[name].leases == 0


async def test_other_versions_go_their_way(tiny_base: Path, tmp_path: Path) -> None:
    async with promoted(tiny_base, tmp_path / "data") as (built, _):
        ingest(built, "a", seed=2)
        ingest(built, "b", seed=3)
        assert [way(await ask(built, chat(model))) for model in ("a@1", "a@2", "a", "b")] == [
            *("merged", "lora", "lora", "lora")
        ]


async def test_it_shows_wherever_one_looks(tiny_base: Path, tmp_path: Path) -> None:
    async with promoted(tiny_base, tmp_path / "data") as (built, name):
        await ask(built, chat("a"))
        version = await page(built, "/v1/adapters/a/versions/1")
        assert (version["status"], version["merged"], version["leases"]) == ("merged", "ready", 0)
        (entry,) = (await page(built, "/v1/residency"))["merged"]
        assert (entry["name"], entry["adapter"], entry["version"], entry["state"]) == (name, "a", 1, "ready")
        assert entry["planned_bytes"]["in all"] > entry["planned_bytes"]["weights"] > 0
        assert "directory" not in json.dumps(entry)
        assert await metric(built, f'loraplex_merged_engine_ready{{adapter="a",name="{name}"}} 1.0')
        assert await metric(built, 'loraplex_requests_total{adapter="a",endpoint="chat",status="200"} 1.0')
        await built.services.merged.demote(name)
        assert (await page(built, "/v1/residency"))["merged"] == []
        version = await page(built, "/v1/adapters/a/versions/1")
        assert (version["status"], version["merged"]) == ("ready", None)


async def test_falling_back_stalls_nobody(tiny_base: Path, tmp_path: Path) -> None:
    async with promoted(tiny_base, tmp_path / "data") as (built, name):
        built.merged[0].pause(after=1)
        running = Exchange(built.app, CHAT, chat("a", LONG, stream=True))
        answering = running.start()
        await until(lambda: built.merged[0].running == 1)
        ending = asyncio.create_task(built.services.merged.demote(name))
        await asyncio.sleep(0)
        late = await ask(built, chat("a"))
        assert (way(late), said(json.loads(late.text))) == ("lora", f"[{name}] one two three")
        assert not ending.done()
        built.merged[0].go_on()
        await asyncio.gather(answering, ending)
        assert (way(running), text_of(running)) == ("merged", f"[{name}] {LONG} ")
        assert built.merged[0].dead


async def test_while_it_is_built_requests_go_the_other_way(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    let = asyncio.Event()

    class Gated(FakeEngine):
        async def start(self) -> None:
            await let.wait()
            await super().start()

    async with promoted(tiny_base, tmp_path / "data") as (built, name):
        monkeypatch.setattr(World, "_make_merged", lambda self, name, _: Gated(name))
        built.merged[0].die()
        await until(lambda: built.services.merged.snapshot()[name].state == "rebuilding")
        assert way(await ask(built, chat("a"))) == "lora"
        let.set()
        await until(lambda: built.services.merged.snapshot()[name].state == "ready")
        assert way(await ask(built, chat("a"))) == "merged"
        assert await metric(built, "loraplex_merged_engine_restarts_total 1.0")


async def test_its_traffic_takes_no_seat_of_the_base_engine(tiny_base: Path, tmp_path: Path) -> None:
    async with promoted(tiny_base, tmp_path / "data", max_num_seqs=1, max_loras=1, max_waiting_requests=4) as (
        built,
        _,
    ):
        built.merged[0].pause()
        crowd = [Exchange(built.app, CHAT, chat("a", LONG)) for _ in range(7)]
        answering = [each.start() for each in crowd]
        await until(lambda: sum(bool(each.messages) for each in crowd) == 1)
        assert (built.merged[0].running, built.services.merged.waiting) == (2, 4)
        assert (await ask(built, chat())).status == 429, "who may wait is counted together"
        assert built.services.turns.waiting == 0
        assert [each.status for each in crowd if each.messages] == [429]
        for each in crowd:
            each.leave()
        await asyncio.wait(answering)
        assert (await ask(built, chat())).status == 200


# Its death ----------------------------------------------------------------------------------------------------------


async def stream_with_a_death(built: World, path: str, body: dict[str, Any], after: int) -> Exchange:
    """The merged engine dies when so many events have been heard."""
    built.merged[0].pause(after)
    exchange = Exchange(built.app, path, {**body, "stream": True})
    answering = exchange.start()
    heard = 0
    while heard < after:
        heard += bool((await exchange.heard()).get("body"))
    built.merged[0].die()
    await asyncio.wait_for(answering, PATIENCE_S)
    return exchange


@pytest.mark.parametrize("after", [1, 2, 17])
@pytest.mark.parametrize("endpoint", ["chat", "completions"])
async def test_a_stream_is_told_to_its_end(tiny_base: Path, tmp_path: Path, endpoint: str, after: int) -> None:
    async with promoted(tiny_base, tmp_path / "data") as (built, name):
        path = CHAT if endpoint == "chat" else COMPLETIONS
        body: dict[str, Any] = chat("a", LONG) if endpoint == "chat" else {"model": "a", "prompt": LONG}
        body |= {"stream_options": {"include_usage": True}, "max_tokens": 100}
        undisturbed = await ask(built, {**body, "stream": True}, path)
        cut = await stream_with_a_death(built, path, body, after)
        assert (way(cut), text_of(cut)) == ("merged", f"[{name}] {LONG} ")
        assert await metric(built, 'loraplex_merged_rescues_total{adapter="a",outcome="continued"} 1.0')
        one, other = events(undisturbed.text), events(cut.text)
        for chunk in [*one[:-1], *other[:-1]]:
            chunk["id"] = chunk["created"] = None
        assert other == one, "event for event what an undisturbed stream says"
        served = f'adapter="a",endpoint="{endpoint}",status="200"'
        assert await metric(built, f"loraplex_requests_total{{{served}}} 2.0")
        assert await metric(built, 'loraplex_generated_tokens_total{adapter="a"} 62.0')
        assert await metric(built, 'loraplex_prompt_tokens_total{adapter="a"} 60.0')
        assert built.services.residency.snapshot()[name].leases == built.engine.running == 0


async def test_the_limit_of_tokens_is_that_of_the_whole_answer(tiny_base: Path, tmp_path: Path) -> None:
    async with promoted(tiny_base, tmp_path / "data") as (built, name):
        cut = await stream_with_a_death(built, CHAT, chat("a", LONG, max_tokens=9), 4)
        assert text_of(cut) == f"[{name}] w0 w1 w2 w3 w4 w5 w6 w7 "


async def test_a_whole_answer_is_asked_again(tiny_base: Path, tmp_path: Path) -> None:
    async with promoted(tiny_base, tmp_path / "data") as (built, name):
        built.merged[0].pause()
        exchange = Exchange(built.app, CHAT, chat("a", LONG, n=1, tools=[{"type": "function"}]))
        answering = exchange.start()
        await until(lambda: built.merged[0].running == 1)
        built.merged[0].die()
        await answering
        assert (exchange.status, way(exchange)) == (200, "lora")
        assert said(json.loads(exchange.text)) == f"[{name}] {LONG}"
        assert await metric(built, 'loraplex_merged_rescues_total{adapter="a",outcome="again"} 1.0')
        assert await metric(built, 'loraplex_requests_total{adapter="a",endpoint="chat",status="200"} 1.0')
        assert await metric(built, 'loraplex_generated_tokens_total{adapter="a"} 31.0')


async def test_those_in_its_line_go_the_other_way(tiny_base: Path, tmp_path: Path) -> None:
    async with promoted(tiny_base, tmp_path / "data", max_num_seqs=1, max_loras=1) as (built, name):
        built.merged[0].pause()
        crowd = [Exchange(built.app, CHAT, chat("a", LONG)) for _ in range(5)]
        answering = [each.start() for each in crowd]
        await until(lambda: built.services.merged.waiting == 3)
        built.merged[0].die()
        await asyncio.gather(*answering)
        assert [each.status for each in crowd] == [200] * 5
        assert {said(json.loads(each.text)) for each in crowd} == {f"[{name}] {LONG}"}


async def test_what_cannot_be_continued_ends_with_an_honest_error(tiny_base: Path, tmp_path: Path) -> None:
    async with promoted(tiny_base, tmp_path / "data") as (built, _):
        cut = await stream_with_a_death(built, CHAT, chat("a", LONG, logprobs=True), 3)
        *chunks, error, done = events(cut.text)
        assert (done, error["error"]["code"]) == ("[DONE]", "engine_unavailable")
        assert "cannot be continued exactly: it was asked with logprobs" in error["error"]["message"]
        assert all("choices" in chunk for chunk in chunks)
        assert await metric(built, 'loraplex_merged_rescues_total{adapter="a",outcome="failed"} 1.0')


async def test_when_both_engines_are_dead_the_stream_says_so(tiny_base: Path, tmp_path: Path) -> None:
    async with promoted(tiny_base, tmp_path / "data") as (built, _):
        await built.services.pool.close()
        cut = await stream_with_a_death(built, CHAT, chat("a", LONG), 3)
        *_, error, done = events(cut.text)
        assert (done, error["error"]["code"]) == ("[DONE]", "engine_unavailable")


async def test_a_merged_engine_goes_on_while_the_base_engine_is_rebuilt(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pools, "FIRST_RETRY_S", PATIENCE_S)
    async with promoted(tiny_base, tmp_path / "data") as (built, _):
        built.engine.die()
        assert (await ask(built, chat())).status == 503
        assert (await ask(built, chat("a"))).status == 200


async def test_a_client_that_leaves_the_second_half_gives_everything_back(tiny_base: Path, tmp_path: Path) -> None:
    async with promoted(tiny_base, tmp_path / "data") as (built, name):
        built.merged[0].pause(after=1)
        built.engine.pause(after=1)
        exchange = Exchange(built.app, CHAT, chat("a", LONG, stream=True))
        answering = exchange.start()
        await until(lambda: built.merged[0].running == 1)
        built.merged[0].die()
        await until(lambda: built.engine.running == 1)
        assert built.services.merged.snapshot()[name].leases == 1, "its version is not removed meanwhile"
        exchange.leave()
        await answering
        await until(lambda: built.engine.running == 0)
        assert built.services.residency.snapshot()[name].leases == 0
        assert built.services.merged.snapshot()[name].leases == 0
        assert built.services.turns.waiting == built.services.turns._taken == 0


# Versions that come and go ------------------------------------------------------------------------------------------


async def test_a_deleted_version_takes_its_engine_along_when_nobody_uses_it(tiny_base: Path, tmp_path: Path) -> None:
    async with promoted(tiny_base, tmp_path / "data") as (built, name):
        built.merged[0].pause(after=1)
        running = Exchange(built.app, CHAT, chat("a", LONG, stream=True))
        answering = running.start()
        await until(lambda: built.merged[0].running == 1)
        deletion = asyncio.create_task(ask(built, {}, "/v1/adapters/a", "DELETE"))
        await until(lambda: built.services.merged.snapshot()[name].state == "draining")
        assert (await ask(built, chat("a"))).status == 409
        built.merged[0].go_on()
        await asyncio.gather(answering, deletion)
        assert text_of(running) == f"[{name}] {LONG} "
        assert (built.services.merged.snapshot(), built.merged[0].dead) == ({}, True)
        assert (await ask(built, chat("a"))).status == 404


async def test_a_forced_deletion_cuts_the_streams_of_a_merged_engine(tiny_base: Path, tmp_path: Path) -> None:
    async with promoted(tiny_base, tmp_path / "data") as (built, _):
        built.merged[0].pause(after=1)
        running = Exchange(built.app, CHAT, chat("a", LONG, stream=True))
        answering = running.start()
        await until(lambda: built.merged[0].running == 1)
        deletion = await ask(built, {}, "/v1/adapters/a?force=true", "DELETE")
        assert json.loads(deletion.text)["cut"] == {"a@1": 1}
        await answering
        assert events(running.text)[-2]["error"]["code"] == "adapter_deleted"
        assert built.services.merged.snapshot() == {}


class CorruptEngine(FakeEngine):
    @asynccontextmanager
    async def generate(self, generation: Generation) -> AsyncIterator[Answer]:
        async with super().generate(generation) as answer:
            answer.stats.corrupted = not generation.request_id.startswith(("warming", "readiness"))
            yield answer


async def test_nan_of_a_merged_engine_takes_the_version_and_the_engine_out_of_service(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(World, "_make_merged", lambda self, name, _: CorruptEngine(name))
    async with promoted(tiny_base, tmp_path / "data") as (built, _):
        await ask(built, chat("a", stream=True))
        await until(lambda: built.services.merged.snapshot() == {})
        assert built.services.registry.resolve("a", "1").state == "quarantined"
        assert (await ask(built, chat("a"))).status == 409


async def test_retention_does_not_take_a_version_that_has_an_engine(tiny_base: Path, tmp_path: Path) -> None:
    async with promoted(tiny_base, tmp_path / "data") as (built, _):
        ingest(built, "a", seed=2)
        judged, _ = await built.services.lifecycle.retire("a", 1, dry_run=True)
        assert [(each.version.number, each.goes) for each in judged] == [(1, False), (2, False)]


async def test_a_version_that_no_engine_can_swap_is_served_merged_and_no_other_way(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = world(tiny_base, tmp_path / "data", memory_reserve_bytes=0)
    name = ingest(built, "a")
    built.services.registry.set_state("a", 1, MERGE_ONLY)
    async with built.running():
        before = await ask(built, chat("a@1"))
        assert (before.status, json.loads(before.text)["error"]["code"]) == (409, "adapter_merge_only")
        await built.services.merged.promote(name, tiny_base)
        monkeypatch.setattr(pools, "FIRST_RETRY_S", 60)  # of the engine after this one
        answer = await ask(built, chat("a@1"))
        assert (answer.status, way(answer), said(json.loads(answer.text))) == (200, "merged", f"[{name}] one two three")
        assert (await page(built, "/v1/adapters/a/versions/1"))["status"] == "merged"

        cut = await stream_with_a_death(built, CHAT, chat("a@1", LONG), 3)
        *_, error, done = events(cut.text)
        assert (done, error["error"]["code"]) == ("[DONE]", "engine_unavailable")
        await until(lambda: len(built.merged) == 2 and built.services.merged.snapshot()[name].state == "ready")
        assert (await ask(built, chat("a@1"))).status == 200
        assert built.engine.loads == []

        built.merged[-1].die()
        await until(lambda: built.services.merged.snapshot()[name].state != "ready")
        meanwhile = await ask(built, chat("a@1"))
        assert meanwhile.status == 503
        assert header(meanwhile, "retry-after") == "5"


async def test_a_shadow_of_a_merged_version_is_asked_as_ever(tiny_base: Path, tmp_path: Path) -> None:
    async with promoted(tiny_base, tmp_path / "data") as (built, _):
        shadow = ingest(built, "a", seed=2)
        built.services.registry.set_alias("a", "default", {1: 1})
        await ask(built, {"shadow": {"version": 2, "percent": 100}}, "/v1/adapters/a/aliases/default", "PUT")
        answer = await ask(built, chat("a", stream=True))
        assert way(answer) == "merged"
        await until(lambda: shadow in built.services.residency.snapshot())
        await until(lambda: built.engine.running == 0)
        found = await page(built, "/v1/adapters/a/aliases/default/shadow")
        assert (found["compared"], found["errors"]) == (1, {})


def test_the_sum_of_two_engines_work() -> None:
    total = Stats.total([Stats(0.5, 3, 4), Stats(0.2, 1, 2), Stats(None, 0, 5)])
    assert (total.ttft_s, total.prompt_tokens, total.generated_tokens) == (0.5, 4, 11)
    assert Stats.total([]).ttft_s is None
