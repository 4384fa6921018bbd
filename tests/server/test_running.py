"""A forced deletion cuts off the requests that use the adapter, wherever they wait, and nobody else's."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from starlette.types import Message

from server import running
from tests.server.harness import Exchange, World, chat, events, ingest, until, world

ADAPTERS = "/v1/adapters"
CHAT = "/v1/chat/completions"
LONG = " ".join("x" * 20)


@pytest.fixture
async def standing(tiny_base: Path, tmp_path: Path) -> AsyncIterator[World]:
    """Its answers stand still after a few words."""
    async with world(tiny_base, tmp_path / "data").running() as standing:
        standing.engine.pause(after=5)
        yield standing


async def deleted(built: World, path: str) -> tuple[int, Any]:
    asked = Exchange(built.app, path, {}, "DELETE")
    await asked.start()
    return asked.status, json.loads(asked.text)


def leases(built: World) -> int:
    return sum(entry.leases for entry in built.services.residency.snapshot().values())


async def test_a_stream_is_cut_with_an_error_event_and_others_go_on(standing: World) -> None:
    for seed, name in enumerate("ab"):
        ingest(standing, name, seed)
    streams = {name: Exchange(standing.app, CHAT, chat(name, LONG, stream=True)) for name in "aab"}
    streams["a2"] = Exchange(standing.app, CHAT, chat("a", LONG, stream=True))
    answering = {name: stream.start() for name, stream in streams.items()}
    await until(lambda: standing.engine.running == 3 and all(len(each.messages) > 3 for each in streams.values()))
    status, answer = await deleted(standing, f"{ADAPTERS}/a?force=true")
    assert (status, answer["cut"], answer["deleted"]) == (200, {"a@1": 2}, True)
    for name in ("a", "a2"):
        await answering[name]
        *_, error, done = events(streams[name].text)
        assert (error["error"]["code"], done) == ("adapter_deleted", "[DONE]")
        assert "was deleted while it answered" in error["error"]["message"]
        assert streams[name].messages[-1]["more_body"] is False
    assert (standing.engine.running, standing.engine.aborted, leases(standing)) == (1, 2, 1)
    standing.engine.go_on()
    await answering["b"]
    assert events(streams["b"].text)[-1] == "[DONE]"
    assert "error" not in streams["b"].text
    assert standing.services.turns.waiting == 0


async def test_an_answer_that_has_not_begun_is_409(standing: World) -> None:
    ingest(standing, "a")
    whole = Exchange(standing.app, CHAT, chat("a", LONG))
    answering = whole.start()
    await until(lambda: standing.engine.running == 1)
    assert (await deleted(standing, f"{ADAPTERS}/a?force=true"))[1]["cut"] == {"a@1": 1}
    await answering
    assert (whole.status, json.loads(whole.text)["error"]["code"]) == (409, "adapter_deleted")
    assert (standing.engine.running, standing.engine.aborted, leases(standing)) == (0, 1, 0)


async def test_those_who_wait_for_their_turn_are_cut_too(tiny_base: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_num_seqs": 1, "max_loras": 1}
    async with world(tiny_base, tmp_path / "data", **settings).running() as narrow:
        ingest(narrow, "a")
        narrow.engine.pause()
        asked = [Exchange(narrow.app, CHAT, chat("a", LONG)) for _ in range(6)]
        answering = [each.start() for each in asked]
        await until(lambda: narrow.engine.running > 0 and narrow.engine.running + narrow.services.turns.waiting == 6)
        assert (await deleted(narrow, f"{ADAPTERS}/a?force=true"))[1]["cut"] == {"a@1": 6}
        for each in answering:
            await each
        assert {(each.status, json.loads(each.text)["error"]["code"]) for each in asked} == {(409, "adapter_deleted")}
        assert (narrow.services.turns.waiting, narrow.engine.running) == (0, 0)
        narrow.engine.go_on()
        answered = Exchange(narrow.app, CHAT, chat(None, "one"))
        await answered.start()
        assert answered.status == 200


async def test_a_client_that_does_not_read_is_cut_as_well(standing: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "GRACE_S", 0.05)
    ingest(standing, "a")
    stream = Exchange(standing.app, CHAT, chat("a", LONG, stream=True))
    stuck = asyncio.Event()

    async def hear(message: Message) -> None:
        stream.messages.append(message)
        if len(stream.messages) > 3:
            stuck.set()
            await asyncio.Event().wait()

    monkeypatch.setattr(stream, "_hear", hear)
    answering = stream.start()
    await stuck.wait()
    assert (await deleted(standing, f"{ADAPTERS}/a?force=true"))[1] == {
        "object": "adapter.deleted",
        "name": "a",
        "versions": ["a@1"],
        "cut": {"a@1": 1},
        "deleted": True,
    }
    await answering
    assert (standing.engine.running, standing.engine.aborted, leases(standing)) == (0, 1, 0)


async def test_without_force_nobody_is_cut(standing: World) -> None:
    ingest(standing, "a")
    stream = Exchange(standing.app, CHAT, chat("a", LONG, stream=True))
    answering = stream.start()
    await until(lambda: standing.engine.running == 1)
    status, answer = await deleted(standing, f"{ADAPTERS}/a?wait_s=0")
    assert (status, answer["cut"], answer["deleted"]) == (202, {}, False)
    status, answer = await deleted(standing, f"{ADAPTERS}/a?force=true")
    assert (status, answer["cut"], answer["deleted"]) == (200, {"a@1": 1}, True)
    await answering
    assert events(stream.text)[-2]["error"]["code"] == "adapter_deleted"


async def test_a_client_that_leaves_as_it_is_cut_is_just_gone(standing: World) -> None:
    ingest(standing, "a")
    whole = Exchange(standing.app, CHAT, chat("a", LONG))
    answering = whole.start()
    await until(lambda: standing.engine.running == 1)
    deletion = Exchange(standing.app, f"{ADAPTERS}/a?force=true", {}, "DELETE")
    whole.leave()
    await asyncio.gather(deletion.start(), answering)
    assert (deletion.status, standing.engine.running, leases(standing)) == (200, 0, 0)


async def test_the_last_version_of_many_is_cut_alone(standing: World) -> None:
    for seed in (1, 2):
        ingest(standing, "a", seed)
    streams = [Exchange(standing.app, CHAT, chat(f"a@{number}", LONG, stream=True)) for number in (1, 2)]
    answering = [stream.start() for stream in streams]
    await until(lambda: standing.engine.running == 2)
    assert (await deleted(standing, f"{ADAPTERS}/a/versions/1?force=true"))[1]["cut"] == {"a@1": 1}
    await answering[0]
    assert standing.engine.running == 1
    streams[1].leave()
    await answering[1]
