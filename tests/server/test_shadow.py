"""Shadow traffic: the client's answer comes first and alone counts; the copy is polite, compared and dropped."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from server import shadow
from server.engine.fake import FakeEngine
from server.engine.protocol import Generation
from tests.server.harness import Exchange, World, chat, ingest, said, until, upload, world

ADAPTERS = "/v1/adapters"
CHAT = "/v1/chat/completions"
SHADOW = f"{ADAPTERS}/a/aliases/default/shadow"


async def call(built: World, method: str, path: str, body: Any = None) -> Any:
    asked = Exchange(built.app, path, body or {}, method)
    await asked.start()
    return json.loads(asked.text)


async def shadowed(built: World, version: int = 2, percent: int = 100) -> None:
    """Two versions of `a`; the first answers, the second is its shadow."""
    for seed in (1, 2):
        ingest(built, "a", seed)
    body = {"version": 1, "shadow": {"version": version, "percent": percent}}
    shown = await call(built, "PUT", f"{ADAPTERS}/a/aliases/default", body)
    assert (shown["aliases"], shown["shadows"]) == ({"default": 1}, {"default": body["shadow"]})


async def tally(built: World) -> Any:
    return await call(built, "GET", SHADOW)


async def held(built: World, requests: int = 1) -> None:
    """So many requests are answered; then the shadow of the first stands still in the engine, before its first word."""
    await call(built, "POST", CHAT, chat("a@1"))
    built.engine.pause(after=100, loads=True)
    for _ in range(requests):
        await call(built, "POST", CHAT, chat("a"))
    await until(lambda: len(built.engine.loads) == 2)
    built.engine.go_on()
    built.engine.pause()
    await until(lambda: built.engine.running == 1)


def idle(built: World) -> bool:
    worker = built.services.shadows._worker
    return worker is not None and worker.done()


@pytest.fixture
async def fast(tiny_base: Path, tmp_path: Path) -> AsyncIterator[World]:
    async with world(tiny_base, tmp_path / "data").running() as fast:
        yield fast


def alike(_: FakeEngine, generation: Generation) -> list[str]:
    return ["the", "same"]


async def test_a_request_of_the_alias_is_asked_again_and_compared(fast: World) -> None:
    await shadowed(fast)
    answer = await call(fast, "POST", CHAT, chat("a", "a secret question", user="ann"))
    assert said(answer).endswith("a secret question")
    await until(lambda: idle(fast))
    shown = await tally(fast)
    assert {key: shown[key] for key in ("object", "name", "alias", "version", "percent", "compared", "agreed")} == {
        "object": "adapter.shadow",
        "name": "a",
        "alias": "default",
        "version": 2,
        "percent": 100,
        "compared": 1,
        "agreed": 0,
    }
    assert (shown["agreement"], shown["same_finish"], shown["length_ratio"]) == (0.0, 1, 1.0)
    assert (shown["errors"], shown["dropped"]) == ({}, {})
    assert shown["examples"][0]["first_difference"] == 3  # [a@…: there the digests begin
    assert "secret" not in json.dumps(shown)
    page = Exchange(fast.app, "/metrics", {}, "GET")
    await page.start()
    assert 'loraplex_shadow_total{adapter="a",outcome="differed"} 1.0' in page.text
    assert 'loraplex_requests_total{adapter="a",endpoint="chat",status="200"} 1.0' in page.text


async def test_the_same_answer_agrees(fast: World, monkeypatch: pytest.MonkeyPatch) -> None:
    await shadowed(fast)
    monkeypatch.setattr(FakeEngine, "_words", alike)
    await call(fast, "POST", CHAT, chat("a"))
    await until(lambda: idle(fast))
    shown = await tally(fast)
    assert (shown["compared"], shown["agreement"], shown["examples"]) == (1, 1.0, [])


async def test_a_stream_is_asked_again_whole(fast: World, monkeypatch: pytest.MonkeyPatch) -> None:
    await shadowed(fast)
    monkeypatch.setattr(FakeEngine, "_words", alike)
    asked = Exchange(fast.app, CHAT, chat("a", stream=True, stream_options={"include_usage": True}))
    await asked.start()
    await until(lambda: idle(fast))
    (example,) = (await tally(fast))["examples"]
    assert (example["lengths"], example["first_difference"]) == ([9, 8], 8)  # the fake streams a space behind each word
    assert example["finish_reasons"] == [["stop"], ["stop"]]


async def test_only_requests_through_the_alias_are_asked_again(fast: World) -> None:
    await shadowed(fast)
    for model in ("a@1", "a@2", "a@latest", "tiny", None):
        await call(fast, "POST", CHAT, chat(model))
    assert fast.services.shadows._worker is None
    await call(fast, "POST", CHAT, chat("a@default"))
    assert fast.services.shadows._worker is not None


async def test_a_shadow_of_one_percent_gets_few(fast: World, monkeypatch: pytest.MonkeyPatch) -> None:
    await shadowed(fast, percent=7)
    rolled = iter([7, 99, 6])
    monkeypatch.setattr("server.shadow.secrets.randbelow", lambda _: next(rolled))
    for _ in range(3):
        await call(fast, "POST", CHAT, chat("a"))
    await until(lambda: idle(fast))
    assert (await tally(fast))["compared"] == 1


async def test_what_goes_wrong_with_the_shadow_is_no_matter_of_the_client(fast: World) -> None:
    await shadowed(fast)
    fast.services.registry.set_state("a", 2, "quarantined", "NaN")
    answer = await call(fast, "POST", CHAT, chat("a"))
    assert "one two three" in said(answer)
    await until(lambda: idle(fast))
    assert (await tally(fast))["errors"] == {"adapter_quarantined": 1}


async def test_a_bug_in_here_is_counted_and_the_next_is_asked(fast: World, monkeypatch: pytest.MonkeyPatch) -> None:
    await shadowed(fast)
    with monkeypatch.context() as patched:
        patched.setattr(shadow.Shadows, "_compare", lambda *_: 1 / 0)
        await call(fast, "POST", CHAT, chat("a"))
        await until(lambda: idle(fast))
    await call(fast, "POST", CHAT, chat("a"))
    await until(lambda: idle(fast))
    shown = await tally(fast)
    assert (shown["errors"], shown["compared"]) == ({"internal_error": 1}, 1)


async def test_what_does_not_fit_the_queue_is_dropped(fast: World, monkeypatch: pytest.MonkeyPatch) -> None:
    await shadowed(fast)
    monkeypatch.setattr(fast.services.turns, "ask", lambda *_: None)
    for _ in range(shadow.PENDING + 4):
        await call(fast, "POST", CHAT, chat("a"))
    assert (await tally(fast))["dropped"] == {"queue_full": 3}  # one has left the queue to wait for its turn


async def test_one_whose_turn_never_comes_is_dropped(fast: World, monkeypatch: pytest.MonkeyPatch) -> None:
    await shadowed(fast)
    monkeypatch.setattr(shadow, "PATIENCE_S", 0.05)
    monkeypatch.setattr(fast.services.turns, "ask", lambda *_: None)
    await call(fast, "POST", CHAT, chat("a"))
    await until(lambda: idle(fast))
    assert (await tally(fast))["dropped"] == {"no_room": 1}


async def test_a_long_prompt_is_dropped(fast: World, monkeypatch: pytest.MonkeyPatch) -> None:
    await shadowed(fast)
    monkeypatch.setattr(shadow, "MOST_CHARACTERS", 20)
    await call(fast, "POST", CHAT, chat("a", "x" * 30))
    assert (await tally(fast))["dropped"] == {"too_long": 1}


async def test_it_waits_while_others_run_and_gives_way_when_one_must_wait(tiny_base: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_num_seqs": 1, "max_loras": 1}
    async with world(tiny_base, tmp_path / "data", **settings).running() as narrow:
        await shadowed(narrow)
        seats = narrow.services.turns._seats
        await held(narrow)  # nobody else is there: the shadow runs
        (copy,) = narrow.services.turns._polite
        others = [Exchange(narrow.app, CHAT, chat()) for _ in range(seats)]
        answering = [each.start() for each in others]
        await until(lambda: narrow.engine.running == seats and copy not in narrow.services.turns._polite)
        assert narrow.engine.aborted == 1
        await until(lambda: idle(narrow))
        assert (await tally(narrow))["dropped"] == {"preempted": 1}
        assert narrow.services.turns.waiting == 0
        for each in others:
            each.leave()
        await asyncio.wait(answering)
        assert narrow.services.turns._taken == 0


async def test_a_client_that_leaves_is_not_asked_for_again(tiny_base: Path, tmp_path: Path) -> None:
    async with world(tiny_base, tmp_path / "data").running() as built:
        await shadowed(built)
        built.engine.pause(after=2)
        stream = Exchange(built.app, CHAT, chat("a", stream=True))
        answering = stream.start()
        await until(lambda: len(stream.messages) == 3)
        stream.leave()
        await answering
        assert built.services.shadows._worker is None


async def test_a_forced_deletion_of_the_shadow_ends_what_runs_of_it(tiny_base: Path, tmp_path: Path) -> None:
    async with world(tiny_base, tmp_path / "data").running() as built:
        await shadowed(built)
        await held(built)
        answer = await call(built, "DELETE", f"{ADAPTERS}/a/versions/2?force=true")
        assert (answer["cut"], answer["deleted"], built.engine.running) == ({}, True, 0)
        assert (await call(built, "GET", f"{ADAPTERS}/a"))["shadows"] == {}
        assert (await tally(built))["error"]["code"] == "not_found"


async def test_a_stop_ends_what_is_pending(tiny_base: Path, tmp_path: Path) -> None:
    async with world(tiny_base, tmp_path / "data").running() as built:
        await shadowed(built)
        await held(built, requests=3)
        assert len(built.services.shadows._pending) == 2
    assert built.engine.running == 0
    assert len(built.services.shadows._pending) == 0


async def test_what_another_process_sets_is_known_a_moment_later(fast: World, monkeypatch: pytest.MonkeyPatch) -> None:
    await shadowed(fast)
    monkeypatch.setattr(shadow, "REFRESH_S", 0.0)
    fast.services.registry.set_alias("a", "default", shadow=None)
    await call(fast, "POST", CHAT, chat("a@1"))
    assert fast.services.shadows._reading is None
    await call(fast, "POST", CHAT, chat("a"))
    await until(lambda: not fast.services.shadows._known)
    await until(lambda: idle(fast))
    fast.services.shadows._worker = None
    await call(fast, "POST", CHAT, chat("a"))
    assert fast.services.shadows._worker is None


@pytest.mark.parametrize(
    ("alias", "body", "status", "code"),
    [
        ("default", {"shadow": {"version": 7, "percent": 10}}, 404, "not_found"),
        ("default", {"shadow": {"version": 2, "percent": 10}}, 409, "conflict"),
        ("blue", {"shadow": {"version": 1, "percent": 10}}, 404, "not_found"),
        ("default", {"shadow": {"version": 1, "percent": 0}}, 422, "bad_shadow"),
        ("default", {"shadow": {"version": 1, "percent": 101}}, 422, "bad_shadow"),
        ("default", {"shadow": {"version": 1}}, 400, "bad_request"),
        ("default", {"shadow": 1}, 400, "bad_request"),
        ("default", {}, 400, "bad_request"),
        ("default", {"versoin": 1}, 400, "bad_request"),
    ],
)
def test_a_shadow_that_cannot_be(client: TestClient, alias: str, body: Any, status: int, code: str) -> None:
    for seed in (1, 2):
        upload(client, "a", seed)
    before = client.get(f"{ADAPTERS}/a").json()
    response = client.put(f"{ADAPTERS}/a/aliases/{alias}", json=body)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert client.get(f"{ADAPTERS}/a").json()["shadows"] == before["shadows"] == {}
    assert client.get(SHADOW).status_code == 404


def test_a_shadow_stays_until_it_is_of_no_use(client: TestClient) -> None:
    for seed in (1, 2, 3):
        upload(client, "a", seed)
    path = f"{ADAPTERS}/a/aliases/default"
    shown = client.put(path, json={"shadow": {"version": 1, "percent": 10}}).json()
    assert (shown["aliases"], shown["shadows"]) == ({"default": 3}, {"default": {"version": 1, "percent": 10}})
    assert client.put(path, json={"version": 2}).json()["shadows"] == shown["shadows"]
    assert client.get(path).json()["shadow"] == {"version": 1, "percent": 10}
    assert client.put(path, json={"split": {"1": 1, "2": 1}}).json()["shadows"] == shown["shadows"]
    assert client.put(path, json={"version": 1}).json()["shadows"] == {}
    client.put(path, json={"version": 2, "shadow": {"version": 1, "percent": 10}})
    assert client.put(path, json={"shadow": None}).json()["shadows"] == {}
    client.put(f"{ADAPTERS}/a/aliases/blue", json={"version": 2, "shadow": {"version": 1, "percent": 100}})
    assert client.get(ADAPTERS, params={"summary": True}).json()["data"][0]["shadows"]["blue"]["version"] == 1
    assert client.delete(f"{ADAPTERS}/a/aliases/blue").json()["shadows"] == {}
