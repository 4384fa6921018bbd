"""Promotion under load: no failed and no wrong answer? `python -m loadtests.promotion --minutes 10`

First an undisturbed server answers every prompt with every adapter, by LoRA and from a merged engine: the answers that
are right. Then a server with `promotion = auto` is asked by several clients at once, greedily, half of them streaming.
Half-way most tokens move from one adapter to another, and the first merged engine that has stood for a while gets a
SIGKILL. Everything that is answered is compared, and the stories are printed.

In fp32, where a merge and its adapter are the same model up to rounding that hardly turns a token. The engine is kept
whatever it gains: what is asked here is whether anybody notices.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from adapters.base import BaseModel
from loadtests.base import add_base, chosen_base
from loadtests.synthetic import write_adapter
from server.launch import ServerProcess, launch

FIRST, SECOND, OTHERS = "first", "second", ("third", "fourth")
CLIENTS = 6
TOKENS = 24
STRENGTH = 0.12
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
FLAGS = (
    *("--quantization", "none", "--dtype", "float32", "--kv-cache-memory-bytes", "300000000"),
    *("--merge-probe-tokens", "64"),  # it is not the question here what a merge keeps
)
Question = tuple[str, str, str]
"""Endpoint, model, prompt."""


@dataclass
class Outcome:
    answers: int = 0
    by_way: Counter[str] = field(default_factory=Counter)
    was_killed: bool = False
    failed: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    def say(self, what: str) -> None:
        _say(f"{time.monotonic() - self.began:6.1f} s  {what}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtests.promotion", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10, help="of traffic (default: 10)")
    parser.add_argument("--seed", type=int, default=0, help="of who asks what when (default: 0)")
    parser.add_argument("--prompts", type=int, default=len(PROMPTS), help="different ones, at most 8 (default: 8)")
    add_base(parser)
    arguments = parser.parse_args(argv)
    base = chosen_base(arguments)
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        models = [FIRST, SECOND, *OTHERS]
        paths = {
            name: write_adapter(scratch / name, base, rank=8, seed=seed, strength=STRENGTH)
            for seed, name in enumerate(models)
        }
        with _serve(scratch / "undisturbed", base, ["--promotion", "off"]) as server:
            right = asyncio.run(_right_answers(server.url, base, paths, PROMPTS[: arguments.prompts]))
        seconds = 60 * arguments.minutes
        with _serve(scratch / "promoting", base, _rules(seconds)) as server:
            outcome, stories = asyncio.run(_under_load(server, base, paths, right, seconds, arguments.seed))
    _print(outcome, stories)
    return 1 if outcome.failed or outcome.wrong or _missing(outcome, stories) else 0


def _serve(directory: Path, base: BaseModel, flags: Sequence[str]) -> ServerProcess:
    named = ["--model", str(base.path), "--served-model-name", base.name, "--data-dir", str(directory / "data")]
    server = launch([*named, *FLAGS, *flags], directory / "server.log")
    try:
        server.wait_ready(900)
    except BaseException:
        server.kill()
        raise
    return server


def _rules(seconds: float) -> list[str]:
    """So short that there is time for two promotions."""
    rules = {
        "promotion": "auto",
        "promotion-window-s": max(5.0, seconds / 20),
        "promotion-min-life-s": seconds / 20,
        "promotion-tokens-per-minute": 100,
        "promotion-requests": 20,
        "promotion-speedup": 0,
    }
    return [word for name, value in rules.items() for word in (f"--{name}", str(value))]


async def _right_answers(
    url: str, base: BaseModel, paths: Mapping[str, Path], prompts: Sequence[str]
) -> dict[Question, set[str]]:
    questions = [
        (endpoint, model, prompt)
        for endpoint in ("chat/completions", "completions")
        for model in (base.name, *paths)
        for prompt in prompts
    ]
    right: dict[Question, set[str]] = defaultdict(set)
    async with _client(url) as client:
        await _upload(client, paths)
        _say(f"{len(questions)} questions by LoRA")
        await _learn(client, questions, right)
        for promoted in (FIRST, SECOND):
            engine = f"/v1/adapters/{promoted}/versions/1/merged"
            _say(f"{promoted} is merged and asked again")
            job = (await client.put(f"{engine}?wait_s=600")).raise_for_status().json()
            assert job["state"] == "succeeded", job
            await _learn(client, [each for each in questions if each[1] == promoted], right, way="merged")
            (await client.delete(f"{engine}?wait_s=60")).raise_for_status()
    both = sum(len(texts) > 1 for texts in right.values())
    _say(f"{both} of {len(right)} have another answer on another path or in another batch")
    return right


def _say(what: str) -> None:
    Console(stderr=True, markup=False, highlight=False).print(what, soft_wrap=True)


async def _learn(
    client: httpx.AsyncClient, questions: Sequence[Question], right: dict[Question, set[str]], way: str | None = None
) -> None:
    """Alone, and as many at once as there will be: rounding depends on who else is in the batch."""
    for at_once in (1, CLIENTS):
        turns = asyncio.Semaphore(at_once)

        async def one(question: Question, turns: asyncio.Semaphore = turns) -> None:
            async with turns:
                text, taken = await _ask(client, question, stream=False)
                assert way in (None, taken), (question, taken)
                right[question].add(text)

        await asyncio.gather(*(one(question) for question in questions))


async def _under_load(
    server: ServerProcess,
    base: BaseModel,
    paths: Mapping[str, Path],
    right: Mapping[Question, set[str]],
    seconds: float,
    seed: int,
) -> tuple[Outcome, list[dict[str, Any]]]:
    async with _client(server.url) as client:
        await _upload(client, paths)
        outcome = Outcome()
        asking = [
            asyncio.create_task(_keep_asking(client, base, right, outcome, seconds, random.Random(f"{seed}-{number}")))
            for number in range(CLIENTS)
        ]
        watching = asyncio.create_task(_watch(client, server, outcome, seconds))
        await asyncio.gather(*asking)
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching
        stories = (await client.get("/v1/promotions")).raise_for_status().json()["data"]
        return outcome, list(reversed(stories))


async def _keep_asking(
    client: httpx.AsyncClient,
    base: BaseModel,
    right: Mapping[Question, set[str]],
    outcome: Outcome,
    seconds: float,
    chance: random.Random,
) -> None:
    models = [FIRST, SECOND, *OTHERS, base.name]
    prompts = sorted({prompt for _, _, prompt in right})
    while (elapsed := time.monotonic() - outcome.began) < seconds:
        weights = (7, 1, 1, 1, 1) if elapsed < seconds / 2 else (1, 7, 1, 1, 1)
        (model,) = chance.choices(models, weights)
        question = (chance.choice(("chat/completions", "completions")), model, chance.choice(prompts))
        stream = chance.random() < 0.5
        try:
            text, way = await _ask(client, question, stream=stream)
        except (httpx.HTTPError, AssertionError) as error:
            outcome.failed.append(f"{question}, stream={stream}: {type(error).__name__} {error}")
            outcome.say(f"FAILED {outcome.failed[-1]}")
            continue
        outcome.answers += 1
        outcome.by_way[f"{model}, {way}"] += 1
        if text not in right[question]:
            outcome.wrong.append(f"{question}, stream={stream}, {way}: {text!r}, right: {sorted(right[question])}")
            outcome.say(f"WRONG {outcome.wrong[-1]}")


async def _watch(client: httpx.AsyncClient, server: ServerProcess, outcome: Outcome, seconds: float) -> None:
    """Tell of every change, and kill the first merged engine that has stood for a while."""
    known: dict[str, str] = {}
    ready_since: float | None = None
    while True:
        residency = (await client.get("/v1/residency")).raise_for_status().json()
        stories = (await client.get("/v1/promotions")).raise_for_status().json()["data"]
        now = {f"engine of {each['name']}": each["state"] for each in residency["merged"]}
        now |= {each["id"]: f"{each['adapter']} {each['state']}: {each['reason']}" for each in reversed(stories)}
        for what, state in now.items():
            if known.get(what) != state:
                outcome.say(f"{what} {state}")
        known = now
        ready = any(each["state"] == "ready" for each in residency["merged"])
        ready_since = (ready_since or time.monotonic()) if ready else None
        if not outcome.was_killed and ready_since is not None and time.monotonic() - ready_since > seconds / 30:
            victim = _engines(server)[-1]
            victim.kill()
            outcome.was_killed = True
            outcome.say(f"kill -9 of the merged engine's process {victim.pid}")
        await asyncio.sleep(0.25)


def _engines(server: ServerProcess) -> list[psutil.Process]:
    """By age: the base engine's process first."""
    children = psutil.Process(server.process.pid).children(recursive=True)
    found = [each for each in children if "EngineCore" in " ".join(each.cmdline()) or "EngineCore" in each.name()]
    return sorted(found, key=lambda process: process.create_time())


async def _ask(client: httpx.AsyncClient, question: Question, *, stream: bool) -> tuple[str, str]:
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


def _client(url: str) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None)
    return httpx.AsyncClient(base_url=url, timeout=900, trust_env=False, limits=limits)


async def _upload(client: httpx.AsyncClient, paths: Mapping[str, Path]) -> None:
    for name, path in paths.items():
        files = [("files", (each.name, each.read_bytes())) for each in sorted(path.iterdir())]
        (await client.post("/v1/adapters", data={"name": name}, files=files)).raise_for_status()


def _print(outcome: Outcome, stories: Sequence[Mapping[str, Any]]) -> None:
    console = Console()
    table = Table(title="promotions")
    for heading in ("adapter", "state", "share", "build", "speed-up", "reason"):
        table.add_column(heading)
    for story in stories:
        figures, measured = story["figures"], story["figures"].get("measured") or {}
        row = [figures.get("share"), figures.get("build_s"), measured.get("speedup")]
        shown = ["" if value is None else f"{value:.2f}" for value in row]
        table.add_row(story["adapter"], story["state"], *shown, escape(story["reason"]))
    console.print(table)
    ways = ", ".join(f"{count} of {what}" for what, count in sorted(outcome.by_way.items()))
    console.print(f"{outcome.answers} answers: {ways}", highlight=False)
    console.print(f"{len(outcome.failed)} failed, {len(outcome.wrong)} wrong", highlight=False)
    for missing in _missing(outcome, stories):
        console.print(f"not shown: {missing}; more minutes may help", highlight=False)


def _missing(outcome: Outcome, stories: Sequence[Mapping[str, Any]]) -> list[str]:
    """What should have happened meanwhile, and did not."""
    switched = {story["adapter"] for story in stories if story["switched_at"] is not None}
    missing = [f"{adapter} was not promoted" for adapter in (FIRST, SECOND) if adapter not in switched]
    return missing if outcome.was_killed else [*missing, "no merged engine was killed"]


if __name__ == "__main__":
    sys.exit(main())
