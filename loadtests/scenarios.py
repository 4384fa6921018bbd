"""What is asked of the servers: named scenarios in four suites, and which figures of one server are related."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from loadtests.trace import Lengths, Trace, Workload, make_trace, together

Measure = Literal["decode tokens/s", "tokens/s", "TTFT p50", "TTFT p99"]

PROMPT = Lengths(32, 32)
BASE_ONLY = ("base-1", "base-8", "prefill-base")


@dataclass(frozen=True)
class Scenario:
    """Workloads sent at the same time, and the figure that is compared, of `of` alone where it names a model.

    Without workloads of its own it is another figure of the scenario `seen_in`.
    """

    name: str
    title: str
    workloads: tuple[Workload, ...]
    measure: Measure = "decode tokens/s"
    of: str | None = None
    seen_in: str | None = None

    @property
    def source(self) -> str:
        """The scenario whose answers the figure is taken from."""
        return self.seen_in or self.name

    def trace(self, seed: int) -> Trace:
        traces = [make_trace(workload, seed) for workload in self.workloads]
        return together(*traces) if len(traces) > 1 else traces[0]


@dataclass(frozen=True)
class Relation:
    """Two scenarios of one server whose figures are divided: `scenario` / `reference`."""

    title: str
    scenario: str
    reference: str


@dataclass(frozen=True)
class Dials:
    """What a suite is made for. `adapters`: names, the most popular first; `tokens`: of a typical answer."""

    base: str
    adapters: Sequence[str]
    tokens: int
    rate: float
    """Requests a second of the open loops."""


def quick(dials: Dials) -> list[Scenario]:
    """Decoding with and without adapters at 1 and 8 requests, and one long prompt."""
    one, mixed = dials.adapters[0], (*dials.adapters[:3], dials.base)
    return [
        _wave("base-1", "base, 1 request", (dials.base,), 1, dials),
        _wave("base-8", "base, 8 requests", (dials.base,), 8, dials),
        _wave("adapter-1", "one adapter, 1 request", (one,), 1, dials),
        _wave("adapter-8", "one adapter, 8 requests", (one,), 8, dials),
        _wave("mixed-8", "3 adapters + base, 8 requests", mixed, 8, dials),
        _prefill("prefill-base", "prefill of 1,000 tokens, base", dials.base),
        _prefill("prefill-adapter", "prefill of 1,000 tokens, one adapter", one),
    ]


def base(dials: Dials) -> list[Scenario]:
    """What a server without adapters can be asked, too."""
    return [scenario for scenario in quick(replace(dials, adapters=("none",) * 3)) if scenario.name in BASE_ONLY]


def full(dials: Dials) -> list[Scenario]:
    """`quick`, then popularity, arrivals and lengths as the field has them."""
    few, every = tuple(dials.adapters[:4]), tuple(dials.adapters)
    return [
        *quick(dials),
        _wave("eight-8", "8 adapters, 8 requests", tuple(dials.adapters[:8]), 8, dials),
        _field("few", "4 adapters, Zipf(1), 8 clients", few, dials, concurrency=8),
        _field("many", f"{len(every):,} adapters, Zipf(1), 8 clients", every, dials, concurrency=8),
        _field("poisson", "4 adapters, Poisson arrivals", few, dials, rate=dials.rate),
        _field("bursts", "4 adapters, arrivals in bursts", few, dials, rate=dials.rate, burstiness=8.0),
    ]


def fairness(dials: Dials) -> list[Scenario]:
    """One adapter floods the slots, another asks now and then. Meant for `--max-loras 1`."""
    flooding, quiet = dials.adapters[:2]
    answers = Lengths(dials.tokens, dials.tokens)
    few = Workload((quiet,), 6, PROMPT, Lengths(4, 4), rate=dials.rate / 4, burstiness=0.1)
    flood = Workload((flooding,), 24, PROMPT, answers, rate=dials.rate, burstiness=0.1)
    return [
        Scenario("quiet", "a quiet adapter, alone", (few,), "TTFT p99", quiet),
        Scenario("flooded", "the quiet adapter beside a flood", (few, flood), "TTFT p99", quiet),
        Scenario("flood", "flood and quiet adapter together", (), "tokens/s", seen_in="flooded"),
    ]


SUITES: Mapping[str, Callable[[Dials], list[Scenario]]] = {
    "quick": quick,
    "full": full,
    "fairness": fairness,
    "base": base,
}

RELATIONS = (
    Relation("8 adapters mixed / one adapter, 8 requests", "eight-8", "adapter-8"),
    Relation("every adapter / 4 adapters, Zipf(1)", "many", "few"),
    Relation("quiet adapter beside a flood / alone, TTFT p99", "flooded", "quiet"),
)


def _wave(name: str, title: str, models: tuple[str, ...], clients: int, dials: Dials) -> Scenario:
    """As many requests at once as there are clients, models in turn."""
    lengths = Lengths(dials.tokens, dials.tokens)
    return Scenario(name, title, (Workload(models, clients, PROMPT, lengths, concurrency=clients),))


def _prefill(name: str, title: str, model: str) -> Scenario:
    workload = Workload((model,), 2, Lengths(1000, 1000), Lengths(1, 1), concurrency=1)
    return Scenario(name, title, (workload,), "TTFT p50")


def _field(
    name: str,
    title: str,
    models: tuple[str, ...],
    dials: Dials,
    *,
    rate: float | None = None,
    burstiness: float = 1.0,
    concurrency: int | None = None,
) -> Scenario:
    """Popularity by Zipf's law, short prompts and answers common and long ones not rare."""
    answers = Lengths(max(1, dials.tokens // 4), 2 * dials.tokens, "log")
    workload = Workload(
        models, 32, Lengths(8, 256, "log"), answers, 1.0, rate=rate, burstiness=burstiness, concurrency=concurrency
    )
    return Scenario(name, title, (workload,), "tokens/s" if rate is None else "TTFT p50")
