"""A thin layer between vLLM's serving classes and its engine: sees every engine call of a request, changes none.

vLLM's serving classes hand out text, not the engine's outputs. The running request's `Observation` travels in a
context variable; each `generate` call they make reports to it, and closing it aborts whatever has not finished.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextvars import ContextVar
from typing import Any

from server.engine.protocol import Stats
from server.errors import CorruptedOutput


class Observation:
    """What the engine did for one client request, which may be several engine requests (`n`, many prompts)."""

    def __init__(self, echo_model: str) -> None:
        self.echo_model = echo_model
        self.stats = Stats()
        self.unfinished: set[str] = set()


current: ContextVar[Observation | None] = ContextVar("observation", default=None)


class ObservedEngine:
    """Stands in for the engine client; everything but `generate` passes through."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def generate(self, prompt: Any, sampling_params: Any, request_id: str, **options: Any) -> AsyncIterator[Any]:
        # Not `async def`: the observation is read now, in the caller's context, not when iteration begins elsewhere.
        outputs: AsyncIterator[Any] = self._engine.generate(prompt, sampling_params, request_id, **options)
        observation = current.get()
        return outputs if observation is None else _observed(outputs, request_id, observation)


async def _observed(outputs: AsyncIterator[Any], request_id: str, seen: Observation) -> AsyncIterator[Any]:
    started = time.perf_counter()
    prompt_counted = False
    seen.unfinished.add(request_id)
    async for output in outputs:
        if not prompt_counted and output.prompt_token_ids is not None:
            seen.stats.prompt_tokens += len(output.prompt_token_ids)
            seen.stats.prompt_ids += output.prompt_token_ids
            prompt_counted = True
        _count(output, seen.stats, started)
        if output.finished:
            seen.unfinished.discard(request_id)
            # Not from its first output: an answer that is not streamed comes as a whole.
            seen.stats.decode_s = max(0.0, time.perf_counter() - started - (seen.stats.ttft_s or 0.0))
        if output.metrics is not None and output.metrics.is_corrupted:
            seen.stats.corrupted = True
            raise CorruptedOutput("the model produced NaN logits for this request; its output was discarded")
        yield output


def _count(output: Any, stats: Stats, started: float) -> None:
    tokens = sum(len(choice.token_ids) for choice in output.outputs)
    if tokens and stats.ttft_s is None:
        own = getattr(output.metrics, "first_token_latency", 0.0)
        stats.ttft_s = own or time.perf_counter() - started
    stats.generated_tokens += tokens
    for choice in output.outputs:
        stats.generated_ids += choice.token_ids
