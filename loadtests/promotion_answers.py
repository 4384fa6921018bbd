"""What is asked while versions are promoted, and the right answers: those of an undisturbed server, by LoRA and
from a merged engine, alone and among others. Whatever has several right answers keeps all of them.
"""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console

from adapters.base import BaseModel

FIRST, SECOND, OTHERS = "first", "second", ("third", "fourth")
CLIENTS = 6
TOKENS = 24
PROMPTS = (
    "Why is the sky blue?",
    "Tell me a story about the sea.",
    "What is your name?",
    "Name three animals that live in a forest.",
    "How do I boil an egg?",
    "Write a line of a poem about rain.",
    "What does a baker do in the morning?",
    "Explain to a child what a river is.",
)
Question = tuple[str, str, str]
"""Endpoint, model, prompt."""


async def right_answers(
    url: str, base: BaseModel, paths: Mapping[str, Path], prompts: Sequence[str]
) -> dict[Question, set[str]]:
    questions = [
        (endpoint, model, prompt)
        for endpoint in ("chat/completions", "completions")
        for model in (base.name, *paths)
        for prompt in prompts
    ]
    right: dict[Question, set[str]] = defaultdict(set)
    async with connected(url) as client:
        await upload(client, paths)
        say(f"{len(questions)} questions by LoRA")
        await _learn(client, questions, right)
        for promoted in (FIRST, SECOND):
            engine = f"/v1/adapters/{promoted}/versions/1/merged"
            say(f"{promoted} is merged and asked again")
            job = (await client.put(f"{engine}?wait_s=600")).raise_for_status().json()
            assert job["state"] == "succeeded", job
            await _learn(client, [each for each in questions if each[1] == promoted], right, way="merged")
            (await client.delete(f"{engine}?wait_s=60")).raise_for_status()
    both = sum(len(texts) > 1 for texts in right.values())
    say(f"{both} of {len(right)} have another answer on another path or in another batch")
    return right


async def _learn(
    client: httpx.AsyncClient, questions: Sequence[Question], right: dict[Question, set[str]], way: str | None = None
) -> None:
    """Alone, and as many at once as there will be: rounding depends on who else is in the batch."""
    for at_once in (1, CLIENTS):
        turns = asyncio.Semaphore(at_once)

        async def one(question: Question, turns: asyncio.Semaphore = turns) -> None:
            async with turns:
                text, taken = await ask(client, question, stream=False)
                assert way in (None, taken), (question, taken)
                right[question].add(text)

        await asyncio.gather(*(one(question) for question in questions))


async def ask(client: httpx.AsyncClient, question: Question, *, stream: bool) -> tuple[str, str]:
    """The answer and the way it took. Raises HTTPError or AssertionError for one that failed."""
    endpoint, model, prompt = question
    asked = {"messages": [{"role": "user", "content": prompt}]} if endpoint.startswith("chat") else {"prompt": prompt}
    body = {"model": model, **asked, "max_tokens": TOKENS, "temperature": 0, "stream": stream}
    if not stream:
        response = (await client.post(f"/v1/{endpoint}", json=body)).raise_for_status()
        return _text(response.json()["choices"][0]), response.headers["x-loraplex-path"]
    text, ended = "", False
    async with client.stream("POST", f"/v1/{endpoint}", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: "):
                continue
            if line == "data: [DONE]":
                ended = True
                continue
            chunk = json.loads(line.removeprefix("data: "))
            assert "error" not in chunk, chunk["error"]
            for choice in chunk["choices"]:
                text += _text(choice)
        assert ended, "the stream broke off"
        return text, response.headers["x-loraplex-path"]


def _text(choice: Mapping[str, Any]) -> str:
    said = choice.get("message") or choice.get("delta") or choice
    return said.get("content") or said.get("text") or ""


def connected(url: str) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None)
    return httpx.AsyncClient(base_url=url, timeout=900, trust_env=False, limits=limits)


async def upload(client: httpx.AsyncClient, paths: Mapping[str, Path]) -> None:
    for name, path in paths.items():
        files = [("files", (each.name, each.read_bytes())) for each in sorted(path.iterdir())]
        (await client.post("/v1/adapters", data={"name": name}, files=files)).raise_for_status()


def say(what: str) -> None:
    Console(stderr=True, markup=False, highlight=False).print(what, soft_wrap=True)
