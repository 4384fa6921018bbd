"""Two engines beside each other: one version merged, LoRA off, killed in mid-stream, and back; and the same by itself,
where most tokens are for one version. Real vLLM.

In fp32, where a merge and its adapter are the same model: in bf16 rounding turns one greedy token in forty.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from adapters.train.cli import main as evaluation
from tests.flows.live import KEY, Live
from tests.flows.trained import write_rows
from tests.server.harness import until

pytestmark = pytest.mark.engine
MERGED = "/v1/adapters/pirate/versions/1/merged"
QUESTIONS = ("Why is the sky blue?", "Tell me a story about the sea.", "What is your name?")
FASTEST_STEP_S = 1e-3
"""No processor reads half a gigabyte of weights sooner: a shorter time was not measured."""
LONG = "Here is what I know. " * 150


def body(question: str, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}]
    return {"model": "pirate", "messages": messages, "max_tokens": 40, "temperature": 0, **more}


def chat(client: httpx.Client, question: str) -> tuple[str, str]:
    """The way, and the answer."""
    response = client.post("/v1/chat/completions", json=body(question))
    assert response.status_code == 200, response.text
    return response.headers["x-loraplex-path"], response.json()["choices"][0]["message"]["content"]


def engines(live: Live) -> list[psutil.Process]:
    """By age: the base engine's process first."""
    children = psutil.Process(live.server.process.pid).children(recursive=True)
    alive = [each for each in children if each.status() != psutil.STATUS_ZOMBIE]
    found = [each for each in alive if "EngineCore" in " ".join(each.cmdline()) or "EngineCore" in each.name()]
    return sorted(found, key=lambda process: process.create_time())


def until_ready(client: httpx.Client, live: Live, timeout_s: float = 900) -> None:
    deadline = time.monotonic() + timeout_s
    while (shown := client.get(MERGED).json())["state"] != "ready":
        assert time.monotonic() < deadline, (shown, live.server.tail())
        time.sleep(0.5)


def scores(live: Live, data: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """Of pirate, by `train eval` through the server."""
    words = ["pirate", "--server", live.server.url, "--api-key", KEY, "--data", str(data)]
    assert evaluation(["eval", *words, "--max-new-tokens", "40", "--json"]) == 0
    return dict(json.loads(capsys.readouterr().out)["adapter"])


def test_promoted_killed_under_a_stream_rebuilt_and_fallen_back_from(
    beside: Live, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with beside.client() as client:
        before = [chat(client, question) for question in QUESTIONS]
        assert {way for way, _ in before} == {"lora"}
        asked = zip(QUESTIONS, [*texts(before)[:2], "Nobody."], strict=True)
        rows = [[{"role": "user", "content": one}, {"role": "assistant", "content": other}] for one, other in asked]
        data = write_rows([{"messages": row} for row in rows], tmp_path / "asked.jsonl")
        scored = scores(beside, data, capsys)
        assert (scored["exact"], scored.pop("ways")) == (2 / 3, {"lora": 3})
        job = client.put(f"{MERGED}?wait_s=600", timeout=660).json()
        assert job["state"] == "succeeded", (job, beside.server.tail())
        after = [chat(client, question) for question in QUESTIONS]
        assert {way for way, _ in after} == {"merged"}
        assert texts(after) == texts(before)
        scored_merged = scores(beside, data, capsys)
        assert scored_merged.pop("ways") == {"merged": 3}
        assert scored_merged == scored
        assert [chat(client, question) for question in QUESTIONS] == after
        measured = story_by_hand(client, beside, lambda story: "measured" in story["figures"])["figures"]["measured"]
        for when in ("before", "after"):  # of whole answers only: eight of those nine had to be timed
            assert measured[f"tpot_{when}_s"] > FASTEST_STEP_S
            assert measured[f"ttft_{when}_s"] > FASTEST_STEP_S

        page = client.get("/metrics").text
        name = client.get(MERGED).json()["name"]
        assert f'vllm:generation_tokens_total{{engine="0",model_name="{name}"}}' in page
        assert f'vllm:generation_tokens_total{{engine="0",model_name="{beside.base.name}"}}' in page
        assert page.count("# TYPE vllm:generation_tokens_total ") == 1

        told = asyncio.run(answers_under_a_kill(beside))
        assert told == [*texts(before), before[0][1]], "whoever tells them, they are the same"
        assert 'loraplex_merged_rescues_total{adapter="pirate",outcome="continued"}' in client.get("/metrics").text
        assert 'loraplex_merged_rescues_total{adapter="pirate",outcome="failed"}' not in client.get("/metrics").text
        assert client.get("/readyz").status_code == 200
        until_ready(client, beside)
        assert chat(client, QUESTIONS[0]) == after[0]

        assert client.delete(MERGED).json()["ended"]
        assert [chat(client, question) for question in QUESTIONS] == before
        assert len(engines(beside)) == 1
        story_by_hand(client, beside, lambda story: story["state"] == "demoted")


def story_by_hand(
    client: httpx.Client, live: Live, reached: Callable[[dict[str, Any]], bool], timeout_s: float = 900
) -> dict[str, Any]:
    """The story of the engine that was asked for here, when that is so."""
    deadline = time.monotonic() + timeout_s
    while True:
        told = client.get("/v1/promotions?adapter=pirate").json()
        mine = [dict(story) for story in told["data"] if story["origin"] == "hand"]
        if mine and reached(mine[0]):
            return mine[0]
        assert time.monotonic() < deadline, (told, live.server.tail())
        time.sleep(0.3)


def texts(answers: list[tuple[str, str]]) -> list[str]:
    return [text for _, text in answers]


async def answers_under_a_kill(live: Live) -> list[str]:
    """Three streams and a whole answer at once; the younger engine gets SIGKILL in the middle of them."""
    begun = asyncio.Event()
    async with live.async_client() as client:

        async def one(question: str) -> str:
            text, chunks, ids = "", 0, set()
            asked = client.stream("POST", "/v1/chat/completions", json=body(question, stream=True))
            async with asked as response:
                assert response.headers["x-loraplex-path"] == "merged"
                async for line in response.aiter_lines():
                    if not line.startswith("data: {"):
                        continue
                    chunk = json.loads(line.removeprefix("data: "))
                    assert "error" not in chunk, chunk
                    ids.add(chunk["id"])
                    text += chunk["choices"][0]["delta"].get("content") or ""
                    chunks += 1
                    if chunks == 5:
                        begun.set()
            assert len(ids) == 1
            return text

        async def whole() -> str:
            response = await client.post("/v1/chat/completions", json=body(QUESTIONS[0]))
            assert response.status_code == 200, response.text
            return str(response.json()["choices"][0]["message"]["content"])

        answering = [asyncio.create_task(each) for each in [*(one(question) for question in QUESTIONS), whole()]]
        await begun.wait()
        engines(live)[-1].kill()
        return list(await asyncio.gather(*answering))


# By itself ----------------------------------------------------------------------------------------------------------


class Crowd:
    """Two clients that ask one model again and again, one of them streaming; what they got, in the order of asking."""

    def __init__(self, live: Live) -> None:
        self.model = "pirate"
        self.heard: list[tuple[str, str, str]] = []
        """Model, way, answer."""
        self._live = live

    @asynccontextmanager
    async def asking(self) -> AsyncIterator[httpx.AsyncClient]:
        async with self._live.async_client() as client:
            clients = [asyncio.create_task(self._ask(client, stream)) for stream in (False, True)]
            try:
                yield client
            finally:
                for each in clients:
                    each.cancel()
                await asyncio.wait(clients)
            for each in clients:
                assert each.cancelled() or each.exception() is None, each.exception()

    async def _ask(self, client: httpx.AsyncClient, stream: bool) -> None:
        while True:
            model, place = self.model, len(self.heard)
            self.heard.append((model, "", ""))
            asked = {**body(LONG, stream=stream), "model": model, "max_tokens": 8}
            response = await client.post("/v1/chat/completions", json=asked)
            assert response.status_code == 200, response.text
            self.heard[place] = (model, response.headers["x-loraplex-path"], answer_of(response, stream))
            await asyncio.sleep(0.1)  # the merging process has what is left of the machine

    def answers(self, model: str) -> tuple[list[str], set[str]]:
        """The ways, in the order of asking, and the answers."""
        found = [each for each in self.heard if each[0] == model and each[1]]
        return [way for _, way, _ in found], {text for *_, text in found}


def answer_of(response: httpx.Response, stream: bool) -> str:
    if not stream:
        return str(response.json()["choices"][0]["message"]["content"])
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    chunks = [json.loads(line) for line in lines[:-1]]
    assert not [chunk for chunk in chunks if "error" in chunk]
    return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks if chunk["choices"])


async def story_until(client: httpx.AsyncClient, state: str, live: Live, timeout_s: float = 900) -> dict[str, Any]:
    """The newest story of pirate by the policy, when it is in this state."""
    deadline = time.monotonic() + timeout_s
    while True:
        told = (await client.get("/v1/promotions?adapter=pirate")).json()
        mine = [story for story in told["data"] if story["origin"] == "policy"]
        if mine and mine[0]["state"] == state:
            return dict((await client.get(f"/v1/promotions/{mine[0]['id']}")).json())
        assert not mine or mine[0]["ended_at"] is None, (mine[0], live.server.tail())
        assert time.monotonic() < deadline, (told, live.server.tail())
        await asyncio.sleep(0.3)


async def test_most_tokens_get_an_engine_by_themselves_and_lose_it_when_they_move_away(beside: Live) -> None:
    crowd = Crowd(beside)
    async with crowd.asking() as client:
        before = await outcomes(client)
        story = await story_until(client, "serving", beside)
        begun, built, kept = (event["message"] for event in story["events"])
        assert "pirate@1 has 100.0% of the tokens" in begun
        assert built.startswith("its engine was built in ")
        assert kept == story["reason"]
        assert kept.startswith("kept: ")
        assert story["figures"]["measured"]["speedup"] > 0
        assert story["figures"]["fidelity"]["judged"] == "merged, original, float32"
        name = (await client.get(MERGED)).json()["name"]
        ready = f'loraplex_merged_engine_ready{{adapter="pirate",name="{name}"}} 1.0'
        assert ready in (await client.get("/metrics")).text.splitlines()

        crowd.model = ""
        ended = await story_until(client, "demoted", beside)
        assert ended["id"] == story["id"]
        assert "pirate@1 has 0.0% of the tokens" in ended["reason"]
        assert (await client.get(MERGED)).status_code in (200, 404)  # on its way out, or gone
        crowd.model = "pirate"
        back = len(crowd.heard)
        await until(lambda: [each for each in crowd.heard[back:] if each[:2] == ("pirate", "lora")], 300)
        after = await outcomes(client)

    ways, answers = crowd.answers("pirate")
    merged = [place for place, way in enumerate(ways) if way == "merged"]
    assert ways == ["lora"] * merged[0] + ["merged"] * len(merged) + ["lora"] * (len(ways) - merged[-1] - 1)
    assert (ways[0], ways[-1]) == ("lora", "lora")
    assert len(answers) == 1, "whoever tells it, it is the same"
    assert {name: count - before.get(name, 0) for name, count in after.items()} == {"kept": 1, "demoted": 1}


async def outcomes(client: httpx.AsyncClient) -> dict[str, float]:
    """How promotions ended, counted."""
    page = (await client.get("/metrics")).text
    found = re.findall(r'^loraplex_promotions_total\{outcome="(\w+)"\} (\S+)$', page, re.MULTILINE)
    return {name: float(count) for name, count in found}
