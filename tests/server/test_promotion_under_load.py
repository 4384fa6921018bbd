"""Promotion under load, on fake engines: while clients ask, one version is promoted, its engine dies, popularity moves
and another is promoted. Merged for real by the process aside. Nobody notices: no failed answer, no wrong one.

loadtests/promotion.py is the same with real engines.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from server import merging
from server.engine import pool as pools
from tests.server.harness import Exchange, World, chat, events, ingest, said, until, world

CLIENTS = 4
RULES: dict[str, Any] = {
    "promotion": "auto",
    "promotion_window_s": 2,
    "promotion_tokens_per_minute": 0,
    "promotion_min_life_s": 1,
    "promotion_requests": 5,
    "promotion_speedup": 0,
}


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "WORKER", "tests.server.stand_in_merger")
    monkeypatch.setattr("server.promotion.LOOK_S", 0.05)
    for name, seconds in {"WATCH_S": 0.005, "FIRST_RETRY_S": 0.01, "LONGEST_RETRY_S": 0.02}.items():
        monkeypatch.setattr(pools, name, seconds)


class Clients:
    """They ask for as long as they are let; `popular` is who most tokens are for."""

    def __init__(self, built: World, names: dict[str, str]) -> None:
        self.popular = "a"
        self.ways: Counter[tuple[str, str]] = Counter()
        self.wrong: list[str] = []
        self._built = built
        self._names = names
        self._asking = [asyncio.create_task(self._keep_asking(random.Random(seed))) for seed in range(CLIENTS)]

    async def stop(self) -> None:
        for task in self._asking:
            task.cancel()
        await asyncio.wait(self._asking)
        assert [task.exception() for task in self._asking if not task.cancelled()] == []

    async def _keep_asking(self, chance: random.Random) -> None:
        while True:
            model = self.popular if chance.random() < 0.8 else chance.choice(["a", "b"])
            prompt = " ".join(chance.choices(["rain", "sea", "sky", "wind"], k=chance.randint(4, 12)))
            stream = chance.random() < 0.5
            asked = Exchange(self._built.app, "/v1/chat/completions", chat(model, prompt, stream=stream))
            await asked.start()
            told, right = asked.text, f"[{self._names[model]}] {prompt}"
            text = _streamed(told) if stream else said(json.loads(told))
            if asked.status != 200 or text.split() != right.split():
                self.wrong.append(f"{asked.status} {told}, right is {right}")
            way = dict(asked.messages[0]["headers"])[b"x-loraplex-path"].decode()
            self.ways[model, way] += 1


def _streamed(told: str) -> str:
    chunks = [each for each in events(told) if each != "[DONE]"]
    assert events(told)[-1] == "[DONE]"
    return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)


def state_of(built: World, adapter: str) -> str | None:
    stories = built.services.promotions.promotions(adapter=adapter)
    return stories[0].state if stories else None


async def test_popularity_moves_and_an_engine_dies_and_nobody_notices(tiny_base: Path, tmp_path: Path) -> None:
    chosen = RULES | {"quantization": "none", "memory_reserve_bytes": 0}
    async with world(tiny_base, tmp_path / "data", token_s=0.002, **chosen).running() as built:
        names = {name: ingest(built, name, seed) for seed, name in enumerate(("a", "b"))}
        clients = Clients(built, names)

        async def reach(condition: Callable[[], object]) -> None:
            await until(lambda: condition() or clients.wrong or any(task.done() for task in clients._asking), 60)
            assert condition(), (clients.wrong, built.services.promotions.promotions())

        try:
            await reach(lambda: state_of(built, "a") == "serving")
            engine = built.services.merged.find(names["a"])
            assert engine is not None
            await reach(lambda: built.merged[-1].running > 0)
            built.merged[-1].die()
            await reach(lambda: engine.pool.restarts == 1 and engine.state == "ready")
            await reach(lambda: built.merged[-1].running > 0)
            clients.popular = "b"
            await reach(lambda: state_of(built, "b") == "serving")
            before = clients.ways["b", "merged"]
            await reach(lambda: clients.ways["b", "merged"] > before + 10)
        finally:
            await clients.stop()
        assert clients.wrong == []
        assert all(clients.ways[model, way] for model in ("a", "b") for way in ("lora", "merged"))
        told = [(story.adapter, story.state) for story in reversed(built.services.promotions.promotions())]
        assert told == [("a", "demoted"), ("b", "serving")]
        assert set(built.services.merged.snapshot()) == {names["b"]}
