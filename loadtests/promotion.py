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
import random
import sys
import tempfile
import time
from collections import Counter
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
from loadtests.promotion_answers import (
    CLIENTS,
    FIRST,
    OTHERS,
    PROMPTS,
    SECOND,
    Question,
    ask,
    connected,
    right_answers,
    say,
    upload,
)
from loadtests.synthetic import write_adapter
from server.launch import ServerProcess, launch

STRENGTH = 0.12
FLAGS = (
    *("--quantization", "none", "--dtype", "float32", "--kv-cache-memory-bytes", "300000000"),
    *("--merge-probe-tokens", "64"),  # it is not the question here what a merge keeps
)


@dataclass
class Outcome:
    answers: int = 0
    by_way: Counter[str] = field(default_factory=Counter)
    was_killed: bool = False
    failed: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    def say(self, what: str) -> None:
        say(f"{time.monotonic() - self.began:6.1f} s  {what}")


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
            right = asyncio.run(right_answers(server.url, base, paths, PROMPTS[: arguments.prompts]))
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


async def _under_load(
    server: ServerProcess,
    base: BaseModel,
    paths: Mapping[str, Path],
    right: Mapping[Question, set[str]],
    seconds: float,
    seed: int,
) -> tuple[Outcome, list[dict[str, Any]]]:
    async with connected(server.url) as client:
        await upload(client, paths)
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
            text, way = await ask(client, question, stream=stream)
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
