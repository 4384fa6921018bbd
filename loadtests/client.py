"""One streamed completion over HTTP, timed from outside. Tokens are counted from the usage the server reports."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass

import httpx


@dataclass(frozen=True)
class Timing:
    """One request. Seconds are since it was sent."""

    ttft_s: float
    end_s: float
    tokens: int

    @property
    def decode_tokens_per_s(self) -> float:
        return (self.tokens - 1) / (self.end_s - self.ttft_s)


@dataclass(frozen=True)
class Wave:
    """Requests sent together."""

    timings: tuple[Timing, ...]
    wall_s: float

    @property
    def tokens_per_s(self) -> float:
        """All generated tokens over the wall time of the wave: what a user of the machine gets."""
        return sum(timing.tokens for timing in self.timings) / self.wall_s

    @property
    def worst_ttft_s(self) -> float:
        return max(timing.ttft_s for timing in self.timings)


async def complete(client: httpx.AsyncClient, model: str, prompt: str, max_tokens: int) -> Timing:
    """Stream exactly `max_tokens` greedy tokens. Raises on any error, also one in mid-stream."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    started, first, tokens = time.perf_counter(), None, 0
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            raise RuntimeError(f"{response.status_code}: {(await response.aread()).decode()[:500]}")
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise RuntimeError(f"error in mid-stream: {event['error']}")
            if first is None and event["choices"] and event["choices"][0]["delta"].get("content"):
                first = time.perf_counter()
            tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
    if first is None or tokens != max_tokens:
        raise RuntimeError(f"got {tokens} tokens, expected {max_tokens}")
    return Timing(first - started, time.perf_counter() - started, tokens)


async def wave(url: str, models: Sequence[str], max_tokens: int, key: str | None = None) -> Wave:
    """One request for each entry of `models`, all at once, each with a prompt of its own."""
    headers = {"authorization": f"Bearer {key}"} if key else {}
    async with httpx.AsyncClient(base_url=url, timeout=600, headers=headers, trust_env=False) as client:
        started = time.perf_counter()
        requests = [
            complete(client, model, f"Tell me {number + 2} facts about the sea.", max_tokens)
            for number, model in enumerate(models)
        ]
        timings = await asyncio.gather(*requests)
        return Wave(tuple(timings), time.perf_counter() - started)
