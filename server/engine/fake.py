"""An engine without a model, beside the real one: same contract, answers at once, keeps count of what it was asked.

It echoes the prompt, prefixed with who answers, one word a token. Like the real engine it holds adapters by id,
refuses unreadable ones, and *dies* when a generation names an adapter it does not hold. Every word of a prompt has the
log-probability -1, with an adapter whose weights are not all zero -1.5. A prompt may be numbers of words, and one that
has the beginning of the answer at its end is answered with the rest.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

from prometheus_client.metrics_core import Metric
from safetensors.numpy import load_file

from server import problems
from server.engine.protocol import AdapterHandle, Answer, EngineInfo, Generation, Stats
from server.errors import BadRequest, EngineUnavailable

_vocabulary: dict[str, int] = {}
"""Every word that any fake engine has seen → its token."""
FIRST_ID = 1 << 20
"""Beyond every real vocabulary: what a client sends as token numbers is not taken for words of ours."""

Fault = Literal["refused", "nan", "death"]


class FakeEngine:
    """`token_s`: seconds a token takes; `load_s`: seconds a load takes; `capacity`: adapters it holds at most."""

    def __init__(self, model_name: str = "base", *, capacity: int = 17, token_s: float = 0.0, load_s: float = 0.0):
        self._info = EngineInfo(model_name, max_model_len=2048, start_s=0.0)
        self._capacity = capacity
        self._token_s = token_s
        self._load_s = load_s
        self._held: dict[int, AdapterHandle] = {}
        self.running = 0
        self.aborted = 0
        self.loads: list[str] = []
        self.asked: list[str] = []
        """The adapter of every generation that names one, in the order in which they came."""
        self._may_go_on, self._may_load = asyncio.Event(), asyncio.Event()
        self._most_tokens = 0
        self.go_on()
        self.fault: Callable[[AdapterHandle], Fault | None] = lambda handle: None
        """What goes wrong with an adapter, for tests."""
        self.dead = True

    @property
    def info(self) -> EngineInfo:
        return self._info

    async def start(self) -> None:
        self.dead = False
        self._held.clear()

    async def stop(self) -> None:
        self.die()

    def die(self) -> None:
        """What a kill -9 of the engine process looks like from here."""
        self.dead = True
        self.go_on()

    def pause(self, after: int = 0, *, loads: bool = False) -> None:
        """From now on an answer stands still when it has so many tokens, until `go_on`; with `loads` a load as well.
        So a test decides what comes before what, and no clock does."""
        self._most_tokens = after
        self._may_go_on.clear()
        if loads:
            self._may_load.clear()

    def go_on(self) -> None:
        self._may_go_on.set()
        self._may_load.set()

    async def check_health(self) -> None:
        if self.dead:
            raise EngineUnavailable("the engine died; it is being rebuilt, try again shortly")

    async def add_adapter(self, handle: AdapterHandle) -> None:
        await self.check_health()
        self.loads.append(handle.name)
        await asyncio.sleep(self._load_s)
        await self._may_load.wait()
        if not (Path(handle.path) / "adapter_config.json").exists():
            raise ValueError(f"Loading lora {handle.name} failed: No adapter found for {handle.path}")
        if self.fault(handle) == "refused":
            raise ValueError(f"Loading lora {handle.name} failed: a reason")
        if len(self._held) >= self._capacity:
            self._held.pop(
                next(iter(self._held))
            )  # the real engine's own LRU: residency must never let it come to this
        self._held[handle.int_id] = handle

    async def remove_adapter(self, handle: AdapterHandle) -> None:
        await self.check_health()
        self._held.pop(handle.int_id, None)

    async def adapter_ids(self) -> set[int]:
        await self.check_health()
        return set(self._held)

    @asynccontextmanager
    async def generate(self, generation: Generation) -> AsyncIterator[Answer]:
        await self.check_health()
        words = self._words(generation)
        stats = Stats(prompt_tokens=len(_prompt(generation).split()), prompt_ids=_ids(_prompt(generation).split()))
        self.running += 1
        if generation.adapter is not None:
            self.asked.append(generation.adapter.name)
        finished = False
        try:
            if generation.body.get("stream"):
                yield Answer(stats, events=self._stream(generation, words, stats))
            else:
                text = " ".join([word async for word in self._decode(generation, words, stats)])
                yield Answer(stats, 200, _whole(generation, text, stats) | self._read_prompts(generation, text))
            finished = stats.generated_tokens == len(words)
        finally:
            self.running -= 1
            self.aborted += not finished

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        return "".join(f"{word} " for word in _words_of(token_ids))

    def metrics(self) -> Iterable[Metric]:
        return ()

    def _read_prompts(self, generation: Generation, text: str) -> dict[str, Any]:
        """With `prompt_logprobs`, those of the prompt, as the real engine gives them."""
        prompt, adapter = generation.body.get("prompt"), generation.adapter
        if "prompt_logprobs" not in generation.body or not isinstance(prompt, str):
            return {}
        fault = self.fault(adapter) if adapter else None
        if fault == "death":
            self.dead = True
            raise EngineUnavailable("the engine died; it is being rebuilt, try again shortly")
        value = math.nan if fault == "nan" else -1.5 if adapter and _changes(adapter) else -1.0
        read = [None, *({"1": {"logprob": value}} for _ in prompt.split()[1:])]
        return {"choices": [{"index": 0, "text": text, "prompt_logprobs": read}]}

    def _words(self, generation: Generation) -> list[str]:
        adapter = generation.adapter
        if adapter is not None and adapter.int_id not in self._held:
            self.dead = True
            raise EngineUnavailable(f"adapter {adapter.name} was not resident: the engine died")
        who = adapter.name if adapter else self._info.model_name
        asked, mark = _prompt(generation).split(), f"[{who}]"
        begun = len(asked) - asked.index(mark) if mark in asked else 0
        words = [mark, *asked[: len(asked) - begun]][begun:]
        limit = generation.body.get("max_tokens") or generation.body.get("max_completion_tokens")
        return words[:limit] if limit else words

    async def _decode(self, generation: Generation, words: list[str], stats: Stats) -> AsyncIterator[str]:
        started = time.perf_counter()
        for word in words:
            await asyncio.sleep(self._token_s)
            if stats.generated_tokens >= self._most_tokens:
                await self._may_go_on.wait()
            await self.check_health()
            if stats.ttft_s is None:
                stats.ttft_s = time.perf_counter() - started
            stats.generated_tokens += 1
            stats.generated_ids += _ids([word])
            yield word
        stats.decode_s = time.perf_counter() - started - (stats.ttft_s or 0.0)

    async def _stream(self, generation: Generation, words: list[str], stats: Stats) -> AsyncIterator[str]:
        try:
            async for word in self._decode(generation, words, stats):
                yield f"data: {json.dumps(_chunk(generation, word + ' ', None))}\n\n"
            yield f"data: {json.dumps(_chunk(generation, '', 'stop'))}\n\n"
            if (generation.body.get("stream_options") or {}).get("include_usage"):
                chunk = _chunk(generation, "", None) | {"choices": [], "usage": _usage(stats)}
                yield f"data: {json.dumps(chunk)}\n\n"
        except EngineUnavailable as error:
            yield problems.event(503, error.message, code=error.code)
        yield "data: [DONE]\n\n"


def _changes(adapter: AdapterHandle) -> bool:
    tensors = load_file(Path(adapter.path) / "adapter_model.safetensors")
    return any(tensor.any() for name, tensor in tensors.items() if "lora_B" in name)


def _prompt(generation: Generation) -> str:
    if generation.endpoint == "completions":
        prompt = generation.body.get("prompt", "")
        tokens = isinstance(prompt, list) and all(isinstance(token, int) for token in prompt)
        return " ".join(_words_of(prompt)) if tokens else str(prompt)
    messages = generation.body.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(item, Mapping) for item in messages):
        raise BadRequest("messages: expected a non-empty list of messages", param="messages")
    return str(messages[-1].get("content", ""))


def _ids(words: Sequence[str]) -> list[int]:
    return [_vocabulary.setdefault(word, FIRST_ID + len(_vocabulary)) for word in words]


def _words_of(tokens: Sequence[int]) -> list[str]:
    """A number that is none of ours, as a client's own, is a word as it stands."""
    known = list(_vocabulary)
    return [known[token - FIRST_ID] if 0 <= token - FIRST_ID < len(known) else str(token) for token in tokens]


def _whole(generation: Generation, text: str, stats: Stats) -> dict[str, Any]:
    chat = generation.endpoint == "chat"
    content = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
    kind = "chat.completion" if chat else "text_completion"
    return _envelope(generation, kind, content, "stop") | {"usage": _usage(stats)}


def _usage(stats: Stats) -> dict[str, int]:
    return {
        "prompt_tokens": stats.prompt_tokens,
        "completion_tokens": stats.generated_tokens,
        "total_tokens": stats.prompt_tokens + stats.generated_tokens,
    }


def _chunk(generation: Generation, text: str, finish_reason: str | None) -> dict[str, Any]:
    if generation.endpoint == "chat":
        return _envelope(generation, "chat.completion.chunk", {"delta": {"content": text}}, finish_reason)
    return _envelope(generation, "text_completion", {"text": text}, finish_reason)


def _envelope(generation: Generation, kind: str, content: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
    return {
        "id": f"fake-{generation.request_id}",
        "object": kind,
        "created": int(time.time()),
        "model": generation.echo_model,
        "choices": [{"index": 0, "finish_reason": finish_reason, "logprobs": None, **content}],
    }
