"""Nobody gets a neighbour's adapter: 200 requests over base and five adapters at random, 16 at a time, two slots,
three resident adapters, with uploads and deletions going on. Every answer must be the one the request gets alone.

bf16 arithmetic depends on the shape of the batch, so two near-equal tokens may swap. Where an answer differs, the
two best tokens of the solo run at that place must lie within the noise measured on all tokens that agree.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from loadtests.synthetic import write_adapter
from tests.flows.live import Live

pytestmark = pytest.mark.engine
PROMPTS = ("What is the capital of France?", "Name three fish.", "My parcel is late.", "Why is the sky blue?")
TOKENS = 10
REQUESTS = 200
AT_ONCE = 16
LARGEST_NOISE = 0.8
"""Log-probability. The largest difference between a token alone and in a batch that passes as rounding: one token in a
thousand of the strong random adapters strays (0.50 seen)."""
USUAL_NOISE = 0.35
"""All but two in a thousand are within this (0.14 to 0.29 seen)."""


@dataclass(frozen=True)
class Token:
    text: str
    logprob: float
    gap: float
    """To the second best token."""


@dataclass(frozen=True)
class Asked:
    pair: tuple[str, str]
    answer: list[Token]
    to_the_end: bool
    """False when the client left early on purpose."""


def body(model: str, prompt: str, *, stream: bool = False) -> dict[str, object]:
    return {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": TOKENS,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 2,
        "stream": stream,
    }


def tokens_of(content: list[dict[str, Any]]) -> list[Token]:
    found = []
    for entry in content:
        best, second = sorted((top["logprob"] for top in entry["top_logprobs"]), reverse=True)
        found.append(Token(entry["token"], entry["logprob"], best - second))
    return found


async def whole(client: httpx.AsyncClient, model: str, prompt: str) -> list[Token]:
    response = (await client.post("/v1/chat/completions", json=body(model, prompt))).raise_for_status()
    return tokens_of(response.json()["choices"][0]["logprobs"]["content"])


async def streamed(client: httpx.AsyncClient, model: str, prompt: str, leave_after: int | None = None) -> list[Token]:
    """Tokens of a stream; with `leave_after` the connection is dropped after so many events."""
    found: list[Token] = []
    async with client.stream("POST", "/v1/chat/completions", json=body(model, prompt, stream=True)) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            assert "error" not in event, event
            logprobs = event["choices"][0].get("logprobs")
            found += tokens_of(logprobs["content"]) if logprobs else []
            if leave_after is not None and len(found) >= leave_after:
                break
    return found


@pytest.fixture(scope="module")
def models(live: Live, demo_adapters: dict[str, Path]) -> list[str]:
    return [live.base.name, *demo_adapters, "random4", "random8"]


@pytest.fixture(scope="module")
def alone(live: Live, models: list[str]) -> dict[tuple[str, str], list[Token]]:
    """What each request answers with the server to itself."""

    async def ask() -> dict[tuple[str, str], list[Token]]:
        async with live.async_client() as client:
            return {pair: await whole(client, *pair) for pair in itertools.product(models, PROMPTS)}

    return asyncio.run(ask())


async def churn(live: Live, root: Path, stop: asyncio.Event) -> int:
    """Upload, use once, delete; again and again."""
    rounds = 0
    async with live.async_client() as client:
        while not stop.is_set():
            name = f"passing{rounds}"
            path = await asyncio.to_thread(write_adapter, root / name, live.base, rank=4, seed=100 + rounds)
            assert (await asyncio.to_thread(live.upload, name, path)).status_code == 201
            await whole(client, name, PROMPTS[0])
            response = await client.delete(f"/v1/adapters/{name}", params={"wait_s": 120})
            assert response.json()["deleted"], response.text
            rounds += 1
    return rounds


async def test_three_adapters_on_two_slots_all_answer_at_once(
    live: Live, models: list[str], alone: dict[tuple[str, str], list[Token]]
) -> None:
    """On stock vLLM the third waits until an answer of the first two has ended. Nor does pausing change an answer."""
    started, ended = [], []

    async def one(client: httpx.AsyncClient, model: str) -> list[Token]:
        asked = body(model, PROMPTS[0], stream=True) | {"max_tokens": 150, "ignore_eos": True}
        tokens: list[Token] = []
        async with client.stream("POST", "/v1/chat/completions", json=asked) as response:
            async for line in response.aiter_lines():
                event = json.loads(line.removeprefix("data: ")) if line.startswith("data: {") else {}
                choice = (event.get("choices") or [{}])[0]
                if choice.get("logprobs"):
                    tokens += tokens_of(choice["logprobs"]["content"])
                    started.append(model)
        ended.append((model, len(set(started))))
        return tokens

    adapters = models[1:4]
    async with live.async_client() as client:
        answers = await asyncio.gather(*[one(client, model) for model in adapters])
    assert [count for _, count in ended] == [3, 3, 3]
    for model, answer in zip(adapters, answers, strict=True):
        pairs = zip(alone[model, PROMPTS[0]], answer, strict=False)
        parted = next((expected for expected, token in pairs if expected.text != token.text), None)
        assert parted is None or parted.gap < LARGEST_NOISE
    assert [len(answer) for answer in answers] == [150] * 3
    await no_lease_left(live)


@pytest.mark.timeout(1800)  # a processor without bf16 instructions takes 5 minutes; and the fixtures count, too
@pytest.mark.parametrize("how", ["whole", "streamed"])
async def test_every_answer_is_the_one_it_gets_alone(
    live: Live, models: list[str], alone: dict[tuple[str, str], list[Token]], tmp_path: Path, how: str
) -> None:
    assert len({tuple(token.text for token in alone[model, PROMPTS[0]]) for model in models}) == len(models)
    choose, places, stop = random.Random(how), asyncio.Semaphore(AT_ONCE), asyncio.Event()
    async with live.async_client() as client:

        async def one(number: int) -> Asked:
            pair = (choose.choice(models), choose.choice(PROMPTS))
            leave_after = choose.randrange(1, TOKENS) if how == "streamed" and number % 4 == 0 else None
            async with places:
                if how == "whole":
                    return Asked(pair, await whole(client, *pair), to_the_end=True)
                tokens = await streamed(client, *pair, leave_after=leave_after)
                return Asked(pair, tokens, to_the_end=leave_after is None)

        churning = asyncio.create_task(churn(live, tmp_path, stop))
        answers = await asyncio.gather(*[one(number) for number in range(REQUESTS)])
        stop.set()
        rounds = await churning
    same, noises = compare(alone, answers)
    usual, largest = noises[int(0.998 * len(noises))], noises[-1]
    print(
        f"isolation {how}: {same} of {REQUESTS} identical, noise {usual:.3f}, largest {largest:.3f}, "
        f"{rounds} adapters passed through"
    )
    assert rounds > 0
    assert usual < USUAL_NOISE
    assert largest < LARGEST_NOISE
    assert same >= 0.6 * REQUESTS  # the random adapters are full of near-ties: 0.75 to 0.86 on two processors
    await no_lease_left(live)


def compare(alone: dict[tuple[str, str], list[Token]], answers: list[Asked]) -> tuple[int, list[float]]:
    """(identical answers, |Δlogprob| of the tokens that agree, in order); a difference that is no near-tie fails, and
    so does an answer that ends before the solo one although its client stayed."""
    noises, swapped = [0.0], []
    for asked in answers:
        pair, answer = asked.pair, asked.answer
        for expected, token in zip(alone[pair], answer, strict=False):
            if expected.text != token.text:
                swapped.append((pair, expected, token))
                break
            noises.append(abs(expected.logprob - token.logprob))
        else:
            assert answer, f"{pair}: got no token"
            assert len(answer) == len(alone[pair]) or not asked.to_the_end, f"{pair}: got {answer}, alone {alone[pair]}"
    for pair, expected, token in swapped:
        assert expected.gap <= 2 * max(noises), f"{pair}: got {token}, alone {expected}, noise {max(noises)}"
    return len(answers) - len(swapped), sorted(noises)


async def no_lease_left(live: Live) -> None:
    async with live.async_client() as client:
        for _ in range(600):
            residency = (await client.get("/v1/residency")).json()["data"]
            page = (await client.get("/metrics")).text
            running = [line for line in page.splitlines() if line.startswith("vllm:num_requests_running{")]
            if all(entry["leases"] == 0 for entry in residency) and all(line.endswith(" 0.0") for line in running):
                assert len(residency) <= 4
                return
            await asyncio.sleep(0.2)
    pytest.fail(f"leases or engine requests left: {residency} {running}")


def test_the_comparison_can_fail() -> None:
    sure, other = Token("Paris", -0.1, 5.0), Token("Rome", -0.1, 5.0)
    alone, pair = {("m", "p"): [sure, sure]}, ("m", "p")
    assert compare(alone, [Asked(pair, [sure, sure], True), Asked(pair, [sure], False)])[0] == 2
    for wrong in (Asked(pair, [other], False), Asked(pair, [sure], True), Asked(pair, [], False)):
        with pytest.raises(AssertionError):
            compare(alone, [wrong])
