"""What every engine promises (server/engine/protocol.py), asked of the fake one always and of vLLM where it may run."""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import os
import warnings
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from adapters.base import BaseModel
from loadtests.synthetic import write_adapter
from server.engine import vllm_args
from server.engine.fake import FakeEngine
from server.engine.protocol import AdapterHandle, Answer, Endpoint, Engine, Generation
from server.engine.vllm import VllmEngine
from server.errors import BadRequest, EngineUnavailable
from server.settings import Settings
from tests.adapters.factories import write_base
from tests.server.harness import events, until

pytestmark = pytest.mark.asyncio(loop_scope="module")

NAME = "contract-base"
PROMPT = "Once upon a time there was"


@dataclass
class Subject:
    """An engine under test, and what the contract must know from outside to check it."""

    engine: Engine
    adapter_path: Path
    unfinished: Callable[[], int]
    """Requests that the engine still works on."""
    ids: Any = field(default_factory=lambda: itertools.count(1))

    def handle(self, path: Path | None = None) -> AdapterHandle:
        number = next(self.ids)
        return AdapterHandle(f"adapter{number}@0123456789ab", str(path or self.adapter_path), number)

    def ask(
        self, endpoint: Endpoint = "completions", adapter: AdapterHandle | None = None, echo: str = "asked", **body: Any
    ) -> Any:
        prompt = {"messages": [{"role": "user", "content": PROMPT}]} if endpoint == "chat" else {"prompt": PROMPT}
        whole = {"max_tokens": 4, "temperature": 0, **prompt, **body}
        return self.engine.generate(Generation(endpoint, whole, f"request-{next(self.ids)}", echo, adapter))

    @asynccontextmanager
    async def loaded(self) -> AsyncIterator[AdapterHandle]:
        handle = self.handle()
        await self.engine.add_adapter(handle)
        try:
            yield handle
        finally:
            await self.engine.remove_adapter(handle)

    async def text(self, adapter: AdapterHandle | None = None) -> str:
        async with self.ask(adapter=adapter) as answer:
            assert answer.status == 200, answer.body
            return str(answer.body["choices"][0]["text"])


def _fake(root: Path) -> Subject:
    base = BaseModel.read(write_base(root / "base"))
    engine = FakeEngine(NAME, capacity=3, token_s=0.05)
    return Subject(engine, write_adapter(root / "adapter", base, rank=4, seed=1), lambda: engine.running)


def _vllm(root: Path, demo_base: Path) -> Subject:
    base = BaseModel.read(demo_base)
    settings = Settings(model=str(demo_base), kv_cache_memory_bytes=300_000_000, max_loras=2)
    vllm_args.prepare_environment(settings)
    targets = {module.rpartition(".")[2] for module in base.modules}
    engine = VllmEngine(lambda: vllm_args.command_line(settings, demo_base, NAME, targets))
    adapter = write_adapter(root / "adapter", base, rank=8, seed=1)
    return Subject(engine, adapter, lambda: len(engine._engine.output_processor.request_states))


@pytest_asyncio.fixture(
    scope="module",
    loop_scope="module",
    params=["fake", pytest.param("vllm", marks=[pytest.mark.engine, pytest.mark.filterwarnings("ignore")])],
)
async def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Subject]:
    """One start for all the cases; the last of them stops it."""
    root, environment = tmp_path_factory.mktemp("contract"), dict(os.environ)
    subject = _fake(root) if request.param == "fake" else _vllm(root, request.getfixturevalue("demo_base"))
    try:
        await subject.engine.start()
        yield subject
    finally:
        await subject.engine.stop()
        os.environ.clear()
        os.environ.update(environment)
        with warnings.catch_warnings(action="ignore"):
            gc.collect()  # vLLM leaves its ZeroMQ context to the collector, which complains


async def gather(answer: Answer) -> list[Any]:
    """The events of a stream, each of which must be complete."""
    assert answer.events is not None
    found = [event async for event in answer.events]
    assert all(event.startswith("data: ") and event.endswith("\n\n") for event in found)
    return events("".join(found))


class TestContract:
    async def test_it_says_what_it_serves(self, subject: Subject) -> None:
        info = subject.engine.info
        assert (info.model_name, info.max_model_len) == (NAME, 2048)
        assert info.start_s >= 0

    async def test_it_is_healthy_and_holds_no_adapter(self, subject: Subject) -> None:
        await subject.engine.check_health()
        assert await subject.engine.adapter_ids() == set()

    async def test_a_whole_completion(self, subject: Subject) -> None:
        async with subject.ask() as answer:
            assert (answer.status, answer.events) == (200, None)
            assert answer.body["object"] == "text_completion"
            assert answer.body["choices"][0]["text"]
        assert 1 <= answer.stats.generated_tokens <= 4
        assert answer.stats.prompt_tokens >= 6
        assert answer.stats.ttft_s > 0
        assert not answer.stats.corrupted

    async def test_a_whole_chat(self, subject: Subject) -> None:
        async with subject.ask("chat") as answer:
            assert answer.body["object"] == "chat.completion"
            assert answer.body["choices"][0]["message"]["role"] == "assistant"
            assert answer.body["choices"][0]["message"]["content"]
            assert answer.body["usage"]["completion_tokens"] == answer.stats.generated_tokens
            json.dumps(answer.body, allow_nan=False)

    @pytest.mark.parametrize("endpoint", ["chat", "completions"])
    async def test_a_stream_ends_with_done_and_says_the_same(self, subject: Subject, endpoint: Endpoint) -> None:
        async with subject.ask(endpoint) as answer:
            whole = answer.body["choices"][0]
        async with subject.ask(endpoint, stream=True) as answer:
            assert (answer.status, answer.body) == (200, None)
            *chunks, done = await gather(answer)
        assert done == "[DONE]"
        parts = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
        if endpoint == "chat":
            said = "".join(part["delta"].get("content") or "" for part in parts)
            assert said.strip() == whole["message"]["content"].strip()
        else:
            assert "".join(part["text"] for part in parts).strip() == whole["text"].strip()
        assert [part["finish_reason"] for part in parts if part["finish_reason"]]
        assert answer.stats.generated_tokens >= 1

    @pytest.mark.parametrize("asked", ["", "name@stable", "base:name@3"])
    async def test_the_answer_repeats_what_was_asked(self, subject: Subject, asked: str) -> None:
        async with subject.ask("chat", echo=asked) as answer:
            assert answer.body["model"] == asked
        async with subject.ask(echo=asked, stream=True) as answer:
            *chunks, _ = await gather(answer)
        assert {chunk["model"] for chunk in chunks} == {asked}

    async def test_concurrent_answers_do_not_mix_up_what_was_asked(self, subject: Subject) -> None:
        async def one(number: int) -> str:
            async with subject.ask(echo=f"asked{number}") as answer:
                return str(answer.body["model"])

        assert await asyncio.gather(*(one(number) for number in range(8))) == [f"asked{n}" for n in range(8)]

    @pytest.mark.parametrize(
        ("body", "param"),
        [({"messages": "hello"}, "messages"), ({"messages": []}, None), ({}, "messages")],
        ids=["wrong type", "empty", "missing"],
    )
    async def test_a_bad_body_is_a_bad_request_that_names_the_field(
        self, subject: Subject, body: dict[str, Any], param: str | None
    ) -> None:
        generation = Generation("chat", body, "bad", "asked", None)
        with pytest.raises(BadRequest) as refused:
            async with subject.engine.generate(generation):
                pass
        assert refused.value.message
        assert param is None or refused.value.param == param
        assert subject.unfinished() == 0

    async def test_leaving_a_stream_early_aborts_it(self, subject: Subject) -> None:
        long: dict[str, Any] = {
            "prompt": " ".join(["word"] * 300),
            "max_tokens": 1000,
            "ignore_eos": True,
            "stream": True,
        }
        async with subject.ask(**long) as answer:
            assert (await anext(answer.events)).startswith("data: ")
            assert subject.unfinished() == 1
        await until(lambda: subject.unfinished() == 0, timeout_s=5)  # its end is further away
        assert 1 <= answer.stats.generated_tokens < 200

    async def test_cancelling_a_whole_answer_aborts_it(self, subject: Subject) -> None:
        long: dict[str, Any] = {"prompt": " ".join(["word"] * 300), "max_tokens": 1000, "ignore_eos": True}

        async def wait_for_it() -> None:
            async with subject.ask(**long):
                pytest.fail("this takes longer")

        task = asyncio.create_task(wait_for_it())
        await until(lambda: subject.unfinished() == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: subject.unfinished() == 0, timeout_s=5)  # its end is further away

    async def test_an_adapter_comes_answers_and_goes(self, subject: Subject) -> None:
        plain = await subject.text()
        async with subject.loaded() as handle:
            assert await subject.engine.adapter_ids() == {handle.int_id}
            adapted = await subject.text(handle)
            assert adapted != plain
            async with subject.ask("chat", adapter=handle, echo="mine", stream=True) as answer:
                *chunks, _ = await gather(answer)
            assert {chunk["model"] for chunk in chunks} == {"mine"}
        assert await subject.engine.adapter_ids() == set()
        assert await subject.text() == plain

    async def test_the_same_files_can_come_again_under_a_fresh_id(self, subject: Subject) -> None:
        answers = []
        for _ in range(2):
            async with subject.loaded() as handle:
                answers.append((await subject.text(handle)).replace(handle.name, "adapter"))
        assert answers[0] == answers[1] != await subject.text()
        assert await subject.engine.adapter_ids() == set()

    async def test_a_refused_adapter_leaves_nothing_registered(self, subject: Subject, tmp_path: Path) -> None:
        async with subject.loaded() as good:
            with pytest.raises(Exception, match=r"\S") as refused:
                await subject.engine.add_adapter(subject.handle(tmp_path))
            assert not isinstance(refused.value, EngineUnavailable)
            assert await subject.engine.adapter_ids() == {good.int_id}
            await subject.engine.check_health()
            assert await subject.text(good) != await subject.text()

    async def test_its_metrics_can_be_read(self, subject: Subject) -> None:
        families = list(subject.engine.metrics())
        assert all(family.name for family in families)
        assert "vllm:lora_requests_info" not in {family.name for family in families}

    async def test_a_stopped_engine_says_so_and_can_be_stopped_again(self, subject: Subject) -> None:
        for _ in range(2):
            await subject.engine.stop()
        with pytest.raises(EngineUnavailable):
            await subject.engine.check_health()
        with pytest.raises(EngineUnavailable):
            await subject.text()
        with pytest.raises(EngineUnavailable):
            await subject.engine.adapter_ids()


@pytest.mark.parametrize(
    "build",
    [
        FakeEngine,
        pytest.param(
            lambda: VllmEngine(list), marks=[pytest.mark.engine, pytest.mark.filterwarnings("ignore")], id="VllmEngine"
        ),
    ],
)
async def test_an_engine_that_never_started_can_be_stopped(build: Callable[[], Engine]) -> None:
    engine = build()
    await engine.stop()
    with pytest.raises(EngineUnavailable):
        await engine.check_health()
