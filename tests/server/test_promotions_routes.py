"""Stories of promotions over HTTP, and what of them comes from requests: who was asked, and how fast."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.server.harness import Exchange, World, chat, ingest, world

PROMOTIONS = "/v1/promotions"


def test_none_yet(refusing: TestClient) -> None:
    assert refusing.get(PROMOTIONS).json() == {
        "object": "list",
        "data": [],
        "first_id": None,
        "last_id": None,
        "has_more": False,
        "promotion": "advise",
        "now": [],
    }
    assert refusing.get(f"{PROMOTIONS}/promo-none").status_code == 404
    assert refusing.get(f"{PROMOTIONS}?state=odd").json()["error"]["param"] == "state"


@pytest.fixture
async def built(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    monkeypatch.setattr("server.promotion.LOOK_S", 3600.0)
    chosen: dict[str, Any] = {"promotion_window_s": 3600, "promotion_tokens_per_minute": 0, "memory_reserve_bytes": 0}
    async with world(tiny_base, tmp_path / "data", token_s=0.002, **chosen).running() as built:
        yield built


async def call(built: World, path: str, body: Any = None, method: str = "GET") -> Any:
    asked = Exchange(built.app, path, body or {}, method)
    await asked.start()
    return json.loads(asked.text)


async def test_requests_become_advice(built: World, monkeypatch: pytest.MonkeyPatch) -> None:
    ingest(built, "a")
    promoter, traffic = built.services.promoter, built.services.promoter._traffic
    for _ in range(6):
        await call(built, "/v1/chat/completions", chat("a", "one two three four five"), "POST")
    streamed = Exchange(built.app, "/v1/chat/completions", chat("a", "one two three four five", stream=True))
    await streamed.start()
    await call(built, "/v1/chat/completions", chat(None, "one"), "POST")
    asked = traffic.asked()["a@1"]
    assert asked.requests == 7
    assert asked.share == pytest.approx(77 / 80)  # five words asked and six answered, seven times; one and two once
    samples = traffic.samples("a@1", "lora")
    assert len(samples) == 7
    for sample in samples:
        assert (sample.load, sample.tpot_s is not None and sample.tpot_s >= 0.002) == (1, True)
    assert [sample.tpot_s for sample in traffic.samples(None, "base")] == [None], "two tokens are too few to be timed"

    now = promoter._ledger.clock()
    monkeypatch.setattr(promoter._ledger, "clock", lambda: now)
    await promoter.look()
    (waiting,) = (await call(built, PROMOTIONS))["now"]
    assert (waiting["adapter"], waiting["version"], waiting["action"]) == ("a", 1, "wait")
    monkeypatch.setattr(promoter._ledger, "clock", lambda: now + 3600)
    await promoter.look()

    listed = await call(built, PROMOTIONS)
    (story,) = listed["data"]
    assert (story["object"], story["adapter"], story["version"], story["state"]) == ("promotion", "a", 1, "advised")
    assert story["reason"].startswith("a@1 has 96.2% of the tokens")
    assert story["figures"]["share"] == pytest.approx(0.9625)
    assert story["figures"]["prediction"]["lora_tpot_s"] >= 0.002
    assert "events" not in story
    one = await call(built, f"{PROMOTIONS}/{story['id']}")
    assert [event["message"] for event in one["events"]] == [story["reason"]]
    assert (await call(built, f"{PROMOTIONS}?adapter=a&state=advised"))["data"] == [story]
    assert (await call(built, f"{PROMOTIONS}?adapter=b"))["data"] == []
    assert (await call(built, f"{PROMOTIONS}?state=serving"))["data"] == []


async def test_a_client_that_leaves_is_counted_but_not_timed(built: World) -> None:
    ingest(built, "a")
    stream = Exchange(built.app, "/v1/chat/completions", chat("a", " ".join("x" * 500), stream=True))
    answering = stream.start()
    while len(stream.messages) < 9:
        await stream.heard()
    stream.leave()
    await answering
    (sample,) = built.services.promoter._traffic.samples("a@1", "lora")
    assert (sample.ttft_s is None, sample.tpot_s) == (False, None)
