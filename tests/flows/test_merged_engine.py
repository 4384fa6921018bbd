"""Two engines beside each other: one version merged, LoRA off, killed in mid-stream, and back. Real vLLM.

In fp32, where a merge and its adapter are the same model: in bf16 rounding turns one greedy token in forty.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from adapters.base import BaseModel
from server.launch import launch
from tests.flows.live import KEY, Live

pytestmark = pytest.mark.engine
MERGED = "/v1/adapters/pirate/versions/1/merged"
QUESTIONS = ("Why is the sky blue?", "Tell me a story about the sea.", "What is your name?")
FLAGS = ["--quantization", "none", "--dtype", "float32", "--max-loras", "2"]
FLAGS += [
    "--kv-cache-memory-bytes",
    "300000000",
    "--max-num-seqs",
    "8",
    "--memory-reserve-bytes",
    "0",
    "--merge-probe-tokens",
    "64",
]


@pytest.fixture(scope="module")
def beside(base: BaseModel, demo_adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    root = tmp_path_factory.mktemp("beside")
    flags = ["--model", str(base.path), "--data-dir", str(root / "data"), f"--api-keys=admin:{KEY}", *FLAGS]
    with launch(flags, root / "server.log") as server:
        server.wait_ready()
        running = Live(server, base)
        assert running.upload("pirate", demo_adapters["pirate"]).status_code == 201
        yield running


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


def until_ready(client: httpx.Client, live: Live, timeout_s: float = 180) -> None:
    deadline = time.monotonic() + timeout_s
    while (shown := client.get(MERGED).json())["state"] != "ready":
        assert time.monotonic() < deadline, (shown, live.server.tail())
        time.sleep(0.5)


def test_promoted_killed_under_a_stream_rebuilt_and_fallen_back_from(beside: Live) -> None:
    with beside.client() as client:
        before = [chat(client, question) for question in QUESTIONS]
        assert {way for way, _ in before} == {"lora"}
        job = client.put(f"{MERGED}?wait_s=300").json()
        assert job["state"] == "succeeded", (job, beside.server.tail())
        after = [chat(client, question) for question in QUESTIONS]
        assert {way for way, _ in after} == {"merged"}
        assert texts(after) == texts(before)

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
