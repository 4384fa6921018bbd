"""What goes wrong in the engine: an adapter that overflows, an engine that is killed. Real vLLM."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from adapters.base import BaseModel
from loadtests.synthetic import write_adapter
from server.launch import launch
from tests.flows.live import KEY, Live

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def fragile(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server of its own, since this module breaks it. It does not try adapters before they serve."""
    root = tmp_path_factory.mktemp("fragile")
    flags = ["--model", str(base.path), "--data-dir", str(root / "data"), f"--api-keys=admin:{KEY}"]
    flags += ["--max-loras", "2", "--kv-cache-memory-bytes", "300000000", "--no-probe-uploads"]
    with launch(flags, root / "server.log") as server:
        server.wait_ready()
        running = Live(server, base)
        good = write_adapter(root / "good", base, rank=4, seed=1)
        assert running.upload("good", good).status_code == 201
        assert running.upload("overflow", write_overflow(root / "overflow", base)).status_code == 201
        yield running


def write_overflow(directory: Path, base: BaseModel) -> Path:
    """Finite in every tensor, so that the gate lets it in; the product overflows."""
    return write_adapter(directory, base, rank=4, seed=2, strength=1e30)


def chat(live: Live, model: str, **options: object) -> tuple[int, dict[str, object]]:
    body = {"model": model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 6, "temperature": 0}
    with live.client() as client:
        response = client.post("/v1/chat/completions", json=body | options)
        return response.status_code, response.json()


def text_of(live: Live, model: str) -> str:
    status, answer = chat(live, model)
    assert status == 200, answer
    return str(answer["choices"][0]["message"]["content"])  # type: ignore[index]


def test_the_probe_refuses_an_adapter_whose_logits_are_nan(live: Live, tmp_path: Path) -> None:
    before = text_of(live, "pirate")
    refused = live.upload("overflow", write_overflow(tmp_path / "overflow", live.base))
    assert (refused.status_code, refused.json()["error"]["code"]) == (422, "probe_failed")
    with live.client() as client:
        assert client.get("/v1/adapters/overflow").status_code == 404
    assert text_of(live, "pirate") == before


def test_an_adapter_whose_logits_are_nan_is_quarantined_and_hurts_nobody(fragile: Live) -> None:
    base_before, good_before = text_of(fragile, fragile.base.name), text_of(fragile, "good")
    status, answer = chat(fragile, "overflow")
    assert status == 500
    assert answer["error"]["code"] == "corrupted_output"  # type: ignore[index]
    status, answer = chat(fragile, "overflow")
    assert status == 409
    assert answer["error"]["code"] == "adapter_quarantined"  # type: ignore[index]
    for _ in range(3):
        assert text_of(fragile, fragile.base.name) == base_before
        assert text_of(fragile, "good") == good_before
    with fragile.client() as client:
        held = {entry["name"].partition("@")[0] for entry in client.get("/v1/residency").json()["data"]}
    assert held == {"good"}


def test_a_killed_engine_is_rebuilt_and_every_adapter_answers_again(fragile: Live) -> None:
    good_before = text_of(fragile, "good")
    events = asyncio.run(stream_while_killing(fragile))
    assert any("error" in event for event in events), events[-1]
    with fragile.client() as client:
        assert client.get("/livez").status_code == 200
        deadline = time.monotonic() + 600
        while client.get("/readyz").status_code != 200:
            assert time.monotonic() < deadline, fragile.server.tail()
            time.sleep(0.5)
        assert "loraplex_engine_restarts_total 1.0" in client.get("/metrics").text
    assert text_of(fragile, "good") == good_before


async def stream_while_killing(live: Live) -> list[dict[str, object]]:
    """A long stream during which the engine process gets SIGKILL; while it is gone, new requests get a clean 503."""
    body = {"model": "good", "messages": [{"role": "user", "content": "Tell me a story"}], "max_tokens": 500}
    events = []
    async with live.async_client() as client:
        request = client.stream("POST", "/v1/chat/completions", json=body | {"stream": True, "ignore_eos": True})
        async with request as response:
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                events.append(json.loads(line.removeprefix("data: ")))
                if len(events) == 5:
                    engine_process(live).send_signal(signal.SIGKILL)
        refused = await client.post("/v1/chat/completions", json=body)
        assert refused.status_code == 503, refused.text
        assert refused.headers["retry-after"]
    return events


def engine_process(live: Live) -> psutil.Process:
    children = psutil.Process(live.server.process.pid).children(recursive=True)
    return next(
        child for child in children if "EngineCore" in " ".join(child.cmdline()) or "EngineCore" in child.name()
    )


def test_a_killed_server_takes_its_engine_with_it(base: BaseModel, tmp_path: Path) -> None:
    """SIGKILL to the one process, as the kernel does when memory is short; a new server finds its memory free."""
    flags = ["--model", str(base.path), "--data-dir", str(tmp_path / "data"), "--kv-cache-memory-bytes", "300000000"]
    with launch(flags, tmp_path / "server.log") as server:
        server.wait_ready()
        engine = engine_process(Live(server, base))
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait()
        _, alive = psutil.wait_procs([engine], timeout=120)
    assert not alive


def test_sigterm_ends_every_process(base: BaseModel, fragile: Live) -> None:
    tree = psutil.Process(fragile.server.process.pid).children(recursive=True)
    assert tree
    assert fragile.server.stop() == 0
    _, alive = psutil.wait_procs(tree, timeout=120)
    for process in alive:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
    assert not alive
