from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from starlette.testclient import TestClient

from server import generate
from server.engine.fake import FakeEngine
from server.engine.protocol import Answer, Generation
from server.errors import CorruptedOutput
from server.launch import ServerProcess
from tests.server.harness import PATIENCE_S, Exchange, World, chat, events, ingest, said, until, upload, world

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@pytest.fixture
def pausing(tiny_base: Path, tmp_path: Path) -> World:
    """Its clients leave while its engine is paused."""
    return world(tiny_base, tmp_path / "pausing")


def leases(built: World) -> int:
    return sum(entry.leases for entry in built.services.residency.snapshot().values())


@pytest.mark.parametrize("model", [None, "", "tiny"])
def test_the_base_model_answers(refusing: TestClient, model: str | None) -> None:
    response = refusing.post(CHAT, json=chat(model))
    assert response.status_code == 200
    assert said(response.json()) == "[tiny] one two three"
    assert response.json()["model"] == "tiny"
    assert response.headers["x-loraplex-path"] == "base"
    assert "x-loraplex-adapter" not in response.headers


@pytest.mark.parametrize(
    ("asked", "number"), [("a", 2), ("a@1", 1), ("a@stable", 1), ("tiny:a", 2), ("tiny:a@stable", 1), ("a@latest", 2)]
)
def test_an_adapter_answers_under_the_name_that_was_asked(client: TestClient, asked: str, number: int) -> None:
    digests = [upload(client, "a", seed)["digest"] for seed in (1, 2)]
    client.put("/v1/adapters/a/aliases/stable", json={"version": 1})
    response = client.post(CHAT, json=chat(asked))
    assert said(response.json()) == f"[a@{digests[number - 1][7:19]}] one two three"
    assert response.json()["model"] == asked
    assert response.headers["x-loraplex-path"] == "lora"
    assert response.headers["x-loraplex-adapter"] == "a"
    assert response.headers["x-loraplex-version"] == str(number)


def test_completions(client: TestClient) -> None:
    digest = upload(client, "a")["digest"]
    response = client.post(COMPLETIONS, json={"model": "a", "prompt": "one two", "max_tokens": 2})
    assert response.json()["object"] == "text_completion"
    assert response.json()["choices"][0]["text"] == f"[a@{digest[7:19]}] one"


def test_a_stream_is_the_same_answer_in_pieces(client: TestClient) -> None:
    digest = upload(client, "a")["digest"]
    response = client.post(CHAT, json=chat("a@1", stream=True))
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    assert (response.headers["x-loraplex-adapter"], response.headers["x-loraplex-version"]) == ("a", "1")
    *chunks, done = events(response.text)
    assert done == "[DONE]"
    assert {chunk["model"] for chunk in chunks} == {"a@1"}
    text = "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks)
    assert text == f"[a@{digest[7:19]}] one two three "
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_the_engine_sees_the_handle_and_never_the_clients_name(client: TestClient, built: World) -> None:
    digest = upload(client, "a")["digest"]
    client.post(CHAT, json=chat("a"))
    client.post(CHAT, json=chat("a@1"))
    assert built.engine.loads == [f"a@{digest[7:19]}"]


def test_leases_end_with_the_answer(client: TestClient, built: World) -> None:
    upload(client, "a")
    for stream in (False, True):
        client.post(CHAT, json=chat("a", stream=stream))
        assert leases(built) == 0
        assert built.engine.running == 0
        assert built.engine.aborted == 0


def test_an_unknown_model_is_openais_404(refusing: TestClient) -> None:
    response = refusing.post(CHAT, json=chat("gpt-4"))
    assert response.status_code == 404
    error = response.json()["error"]
    assert error.pop("message").startswith("The model `gpt-4` does not exist or you do not have access to it")
    assert error == {"type": "invalid_request_error", "param": "model", "code": "model_not_found"}


@pytest.mark.parametrize("model", [3, 0, False, ["a"], {"a": 1}])
def test_a_model_that_is_no_string_is_refused(refusing: TestClient, model: Any) -> None:
    response = refusing.post(CHAT, json=chat() | {"model": model})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "model")


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"\xff\xfe", b'{"a": \xed\xa0\x80}', b"[" * 100_000, b'{"model": "\\ud800"}', b'{"model": "tiny"'],
    ids=["empty", "cut", "not utf-8", "raw surrogate", "deep", "half a pair", "cut late"],
)
def test_a_body_that_is_no_json_is_refused(refusing: TestClient, body: bytes) -> None:
    response = refusing.post(CHAT, content=body, headers={"content-type": "application/json"})
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_json")


@pytest.mark.parametrize("body", [b"[]", b'"text"', b"3", b"null"])
def test_a_body_that_is_no_object_is_refused(refusing: TestClient, body: bytes) -> None:
    response = refusing.post(CHAT, content=body, headers={"content-type": "application/json"})
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_json")


def test_a_whole_surrogate_pair_is_text(refusing: TestClient) -> None:
    body = b'{"messages": [{"role": "user", "content": "\\ud83d\\ude00"}]}'
    response = refusing.post(CHAT, content=body, headers={"content-type": "application/json; charset=utf-8"})
    assert said(response.json()) == "[tiny] \N{GRINNING FACE}"


@pytest.mark.parametrize("kind", ["text/plain", "multipart/form-data", "application/x-www-form-urlencoded", ""])
def test_another_content_type_is_refused(refusing: TestClient, kind: str) -> None:
    response = refusing.post(CHAT, content=b"{}", headers={"content-type": kind})
    assert (response.status_code, response.json()["error"]["code"]) == (400, "unsupported_media_type")


def test_what_the_engine_refuses_names_the_field(client: TestClient, built: World) -> None:
    upload(client, "a")
    response = client.post(CHAT, json={"model": "a", "messages": "hello"})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "messages")
    assert leases(built) == 0
    assert 'loraplex_requests_total{adapter="a",endpoint="chat",status="400"} 1.0' in client.get("/metrics").text


@pytest.mark.parametrize("declared", [True, False])
def test_an_oversize_body_is_refused_whatever_it_declares(tiny_base: Path, tmp_path: Path, declared: bool) -> None:
    content = b" " * 10_000 if declared else (b" " * 1000 for _ in range(10))
    with world(tiny_base, tmp_path / "data", max_request_bytes=5000).client() as client:
        response = client.post(CHAT, content=content, headers={"content-type": "application/json"})
    assert (response.status_code, response.json()["error"]["code"]) == (413, "request_too_large")


def test_an_engine_that_dies_in_mid_stream_is_an_error_event(client: TestClient, built: World) -> None:
    built.engine.pause(after=1)
    upload(client, "a")
    with client.stream("POST", CHAT, json=chat("a", stream=True)) as response:
        assert response.status_code == 200
        assert client.portal is not None
        client.portal.call(built.engine.die)
        *chunks, error, done = events("".join(response.iter_text()))
    assert done == "[DONE]"
    assert error["error"]["code"] == "engine_unavailable"
    assert error["error"]["type"] == "server_error"
    assert all("choices" in chunk for chunk in chunks)


def test_an_adapter_that_the_engine_refuses_is_409_and_takes_nothing_along(client: TestClient, built: World) -> None:
    good, bad = upload(client, "good", 1), upload(client, "bad", 2)
    client.post(CHAT, json=chat("good"))
    blob = built.settings.data_dir / "adapters" / "blobs" / bad["digest"].removeprefix("sha256:")
    (blob / "adapter_config.json").unlink()
    response = client.post(CHAT, json=chat("bad"))
    assert (response.status_code, response.json()["error"]["code"]) == (409, "adapter_refused")
    assert list(built.services.residency.snapshot()) == [f"good@{good['digest'][7:19]}"]


class CorruptEngine(FakeEngine):
    """Its logits are NaN when an adapter is asked: raised at once, or noted in the statistics of a stream."""

    @contextlib.asynccontextmanager
    async def generate(self, generation: Generation) -> AsyncIterator[Answer]:
        if generation.adapter is not None and not generation.body.get("stream"):
            raise CorruptedOutput("the model produced NaN logits")
        async with super().generate(generation) as answer:
            answer.stats.corrupted = generation.adapter is not None
            yield answer


@pytest.mark.parametrize("stream", [False, True])
def test_corrupted_output_quarantines_the_adapter(built: World, monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    monkeypatch.setattr("tests.server.harness.FakeEngine", CorruptEngine)
    with built.client() as client:
        upload(client, "a")
        while client.get("/readyz").status_code != 200:
            time.sleep(0.005)
        first = client.post(CHAT, json=chat("a", stream=stream))
        assert stream or (first.status_code, first.json()["error"]["code"]) == (500, "corrupted_output")
        second = client.post(CHAT, json=chat("a"))
        assert (second.status_code, second.json()["error"]["code"]) == (409, "adapter_quarantined")
        assert client.get("/v1/adapters/a").json()["versions"][0]["state"] == "quarantined"
        assert client.post(CHAT, json=chat()).status_code == 200


# A client that leaves, in this event loop -------------------------------------------------------------------------


async def test_leaving_a_stream_gives_the_lease_back_and_aborts(pausing: World) -> None:
    async with pausing.running():
        name = ingest(pausing, "a")
        pausing.engine.pause(after=1)
        exchange = Exchange(pausing.app, CHAT, chat("a", stream=True))
        answering = exchange.start()
        while not (await exchange.heard()).get("body"):
            assert pausing.services.residency.snapshot()[name].leases == 1
        assert pausing.engine.running == 1
        exchange.leave()
        await asyncio.wait_for(answering, PATIENCE_S)
        await until(lambda: leases(pausing) == 0)
        assert (pausing.engine.running, pausing.engine.aborted) == (0, 1)


async def test_leaving_a_whole_answer_gives_the_lease_back_and_aborts(pausing: World) -> None:
    async with pausing.running():
        ingest(pausing, "a")
        pausing.engine.pause()
        exchange = Exchange(pausing.app, CHAT, chat("a"))
        answering = exchange.start()
        await until(lambda: pausing.engine.running == 1)
        assert leases(pausing) == 1
        exchange.leave()
        await asyncio.wait_for(answering, PATIENCE_S)
        assert (leases(pausing), pausing.engine.running, pausing.engine.aborted) == (0, 0, 1)


async def test_leaving_while_the_adapter_loads_wastes_no_lease(pausing: World) -> None:
    async with pausing.running():
        name = ingest(pausing, "a")
        pausing.engine.pause(loads=True)
        exchange = Exchange(pausing.app, CHAT, chat("a"))
        answering = exchange.start()
        await until(pausing.services.residency.loading)
        exchange.leave()
        await asyncio.wait_for(answering, PATIENCE_S)
        pausing.engine.go_on()
        await until(lambda: name in pausing.services.residency.snapshot())
        assert (leases(pausing), pausing.engine.running, pausing.engine.aborted) == (0, 0, 0)


async def test_leaving_between_answer_and_first_event_gives_the_lease_back(pausing: World) -> None:
    async with pausing.running():
        ingest(pausing, "a")
        exchange = Exchange(pausing.app, CHAT, chat("a", stream=True))
        exchange.leave()  # already gone when the stream begins
        await asyncio.wait_for(exchange.start(), PATIENCE_S)
        await until(lambda: leases(pausing) == 0)
        assert pausing.engine.running == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_a_server_that_gives_up_a_request_gives_the_lease_back(pausing: World, stream: bool) -> None:
    """In whatever moment of its beginning: so many turns of the event loop after the engine has it."""
    async with pausing.running():
        ingest(pausing, "a")
        pausing.engine.pause()
        for turns in range(8):
            answering = Exchange(pausing.app, CHAT, chat("a", stream=stream)).start()
            while not pausing.engine.running:  # noqa: ASYNC110 - to the turn
                await asyncio.sleep(0)
            for _ in range(turns):
                await asyncio.sleep(0)
            answering.cancel()
            await asyncio.wait([answering])
            await until(lambda: leases(pausing) == 0 and pausing.engine.running == 0)
        assert pausing.engine.aborted == 8


async def test_one_clients_leaving_does_not_touch_its_neighbours(pausing: World) -> None:
    async with pausing.running():
        ingest(pausing, "a")
        pausing.engine.pause(after=1)
        staying = [Exchange(pausing.app, CHAT, chat("a", stream=stream)) for stream in (False, True)]
        leaving = [Exchange(pausing.app, CHAT, chat("a", stream=stream)) for stream in (False, True)]
        tasks = [exchange.start() for exchange in (*staying, *leaving)]
        await until(lambda: pausing.engine.running == 4)
        for exchange in leaving:
            exchange.leave()
        await until(lambda: pausing.engine.aborted == 2)
        pausing.engine.go_on()
        await asyncio.gather(*tasks)
        assert said(json.loads(staying[0].text)).endswith("one two three")
        assert events(staying[1].text)[-1] == "[DONE]"
        assert pausing.engine.aborted == 2


# The same over a real socket ------------------------------------------------------------------------------------


def test_a_real_socket_streams_and_answers(live_server: ServerProcess) -> None:
    with httpx.Client(base_url=live_server.url, trust_env=False, timeout=60) as client:
        assert said(client.post(CHAT, json=chat()).json()) == "[tiny] one two three"
        with client.stream("POST", CHAT, json=chat(stream=True)) as response:
            assert events("".join(response.iter_text()))[-1] == "[DONE]"


def test_a_connection_cut_in_the_body_is_no_error_of_the_server(live_server: ServerProcess) -> None:
    before = live_server.log.stat().st_size
    url = urlsplit(live_server.url)
    assert url.hostname is not None
    assert url.port is not None
    head = f"POST {CHAT} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\ncontent-length: 999\r\n\r\n{{"
    with socket.create_connection((url.hostname, url.port)) as connection:
        connection.sendall(head.encode())
        time.sleep(0.1)
    deadline = time.monotonic() + PATIENCE_S
    while b'"path": "/v1/chat/completions"' not in (written := live_server.log.read_bytes()[before:]):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert b"Traceback" not in written
    assert b"unhandled" not in written


@pytest.fixture
def narrow(tiny_base: Path, tmp_path: Path) -> World:
    """One slot that is handed over when its answers have ended, as on CUDA, and as soon as anyone wants it; one
    sequence at a time (and one that is ready to take over)."""
    limits: dict[str, Any] = {
        "device": "cuda",
        "max_loras": 1,
        "max_num_seqs": 1,
        "adapter_turn_s": 0,
        "max_waiting_requests": 12,
    }
    return world(tiny_base, tmp_path / "narrow", **limits)


def _answered(*exchanges: Exchange) -> asyncio.Task[None]:
    """Started; ends when all of them are answered, with success."""

    async def all_answered() -> None:
        await asyncio.gather(*[exchange.start() for exchange in exchanges])
        assert [exchange.status for exchange in exchanges] == [200] * len(exchanges), [each.text for each in exchanges]

    return asyncio.create_task(all_answered())


async def test_a_flood_for_one_adapter_does_not_starve_another(narrow: World) -> None:
    flood, quiet = ingest(narrow, "flood", 1), ingest(narrow, "quiet", 2)
    async with narrow.running():
        narrow.engine.pause()
        many = _answered(*[Exchange(narrow.app, CHAT, chat("flood")) for _ in range(10)])
        await until(lambda: (narrow.engine.running, narrow.services.turns.waiting) == (2, 8))
        one = _answered(Exchange(narrow.app, CHAT, chat("quiet")))
        await until(lambda: narrow.services.turns.waiting == 9)
        narrow.engine.go_on()
        await asyncio.gather(many, one)
        assert narrow.engine.asked == [flood, flood, quiet, *[flood] * 8], "it waits for what runs, not for the flood"
    assert narrow.services.turns.waiting == 0


async def test_the_adapter_of_a_waiting_request_is_loaded_before_its_turn(narrow: World) -> None:
    ingest(narrow, "running", 1)
    waiting = ingest(narrow, "waiting", 2)
    async with narrow.running():
        narrow.engine.pause()
        first = _answered(Exchange(narrow.app, CHAT, chat("running")))
        await until(lambda: leases(narrow) == 1)
        second = _answered(Exchange(narrow.app, CHAT, chat("waiting")))
        await until(lambda: waiting in narrow.services.residency.snapshot())
        assert narrow.services.turns.waiting == 1
        narrow.engine.go_on()
        await asyncio.gather(first, second)


async def test_where_slots_go_round_in_the_engine_nobody_waits_for_one_outside(tiny_base: Path, tmp_path: Path) -> None:
    """Eighteen seats and room for two newcomers beside them, but for two adapters only."""
    limits: dict[str, Any] = {"max_loras": 1, "max_num_seqs": 16, "max_resident_adapters": 2}
    rotating = world(tiny_base, tmp_path / "rotating", **limits)
    flood, quiet, third = (ingest(rotating, name, number) for number, name in enumerate(("flood", "quiet", "third")))
    async with rotating.running():
        rotating.engine.pause()
        many = _answered(*[Exchange(rotating.app, CHAT, chat("flood")) for _ in range(20)])
        await until(lambda: (rotating.engine.running, rotating.services.turns.waiting) == (18, 2))
        one = _answered(Exchange(rotating.app, CHAT, chat("quiet")))
        await until(lambda: rotating.engine.running == 19)
        more = _answered(Exchange(rotating.app, CHAT, chat("third")))
        await until(lambda: rotating.services.turns.waiting == 3)
        rotating.engine.go_on()
        await asyncio.gather(many, one, more)
        assert rotating.engine.asked[:19] == [*[flood] * 18, quiet]
        assert sorted(rotating.engine.asked[19:]) == sorted([third, flood, flood])


async def test_leaving_the_line_makes_way_and_loads_nothing_further(narrow: World) -> None:
    ingest(narrow, "a", 1)
    async with narrow.running():
        narrow.engine.pause()
        served = _answered(*[Exchange(narrow.app, CHAT, chat("a")) for _ in range(2)])
        await until(lambda: narrow.engine.running == 2)
        leaving = Exchange(narrow.app, CHAT, chat("a"))
        task = leaving.start()
        await until(lambda: narrow.services.turns.waiting == 1)
        leaving.leave()
        await task
        assert narrow.services.turns.waiting == 0
        narrow.engine.go_on()
        await served
    assert narrow.engine.aborted == 0


async def test_a_version_deleted_while_a_request_waits_for_it_is_said_to_be_gone(narrow: World) -> None:
    ingest(narrow, "running", 1)
    ingest(narrow, "doomed", 2)
    async with narrow.running():
        narrow.engine.pause()
        first = _answered(Exchange(narrow.app, CHAT, chat("running")))
        await until(lambda: leases(narrow) == 1)
        second = Exchange(narrow.app, CHAT, chat("doomed"))
        task = second.start()
        await until(lambda: narrow.services.turns.waiting == 1)
        deleting = Exchange(narrow.app, "/v1/adapters/doomed", {}, "DELETE")
        await deleting.start()
        assert deleting.status in (200, 202)
        narrow.engine.go_on()
        await first
        await task
    assert second.status in (404, 409), second.text
    assert json.loads(second.text)["error"]["code"] in ("model_not_found", "adapter_draining")


async def test_too_many_waiting_requests_are_told_to_come_back(narrow: World) -> None:
    async with narrow.running():
        narrow.engine.pause()
        many = [Exchange(narrow.app, CHAT, chat("tiny")) for _ in range(16)]
        tasks = [exchange.start() for exchange in many]
        await until(lambda: sum(bool(exchange.messages) for exchange in many) == 2)
        assert (narrow.engine.running, narrow.services.turns.waiting) == (2, 12)
        narrow.engine.go_on()
        await asyncio.gather(*tasks)

    refused = [exchange for exchange in many if exchange.status == 429]
    assert len(refused) == 2, "two run, twelve wait"
    headers = dict(refused[0].messages[0]["headers"])
    assert headers[b"retry-after"] == b"1"
    assert "max_waiting_requests" in refused[0].text
    assert sum(exchange.status == 200 for exchange in many) == 14


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({}, 1),
        ({"n": 3}, 3),
        ({"n": "many"}, 1),
        ({"prompt": "one"}, 1),
        ({"prompt": ["one", "two"], "n": 2}, 4),
        ({"prompt": [1, 2, 3]}, 1),
        ({"prompt": [[1, 2], [3]]}, 2),
        ({"prompt": []}, 1),
    ],
)
def test_a_request_takes_a_seat_for_every_sequence(body: dict[str, Any], expected: int) -> None:
    assert generate._sequences(body) == expected
