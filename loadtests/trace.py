"""What traffic looks like: a seed and a few figures → a trace, request by request. Starts nothing, sends nothing.

The model is that of S-LoRA (Sheng et al. 2023, section 7): the popularity of adapters follows a power law, arrivals a
Gamma process, lengths a distribution between two bounds. The same workload and seed give the same trace, so two
servers can be asked exactly the same.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from zlib import crc32

import numpy as np
import numpy.typing as npt

CHUNK_TOKENS = 16
"""Tokens that one hash id of a trace stands for (the format of the Qwen traces, which vLLM's generator reads)."""


@dataclass(frozen=True)
class Lengths:
    """Tokens, between `low` and `high`, both included. `log`: short ones are common and long ones are not rare."""

    low: int
    high: int
    shape: Literal["uniform", "log"] = "uniform"

    def draw(self, random: np.random.Generator, count: int) -> list[int]:
        if self.shape == "uniform":
            return [int(length) for length in random.integers(self.low, self.high + 1, count)]
        exponents = random.uniform(np.log(self.low), np.log(self.high + 1), count)
        return [min(self.high, int(length)) for length in np.exp(exponents)]


@dataclass(frozen=True)
class Workload:
    """`models` are names as a client writes them, the most popular first.

    Open loop: `rate` requests a second, whatever the server does. Closed loop (`rate` None): `concurrency` clients,
    each sending its next request when it has its answer.
    """

    models: tuple[str, ...]
    requests: int
    input_tokens: Lengths
    output_tokens: Lengths
    zipf: float | None = None
    """Model number i (from 1) is asked for with probability ∝ i^-zipf. 0: all alike; None: strictly in turn."""
    rate: float | None = None
    burstiness: float = 1.0
    """Squared coefficient of variation of the gaps between arrivals: 1 is Poisson, 4 comes in clumps."""
    concurrency: int | None = None


@dataclass(frozen=True)
class Request:
    at_s: float
    """Since the start of the trace."""
    model: str
    input_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class Trace:
    requests: tuple[Request, ...]
    concurrency: int | None
    """Most requests in flight (closed loop), or None."""
    number: int
    """Tells one trace from another: no prompt of one is in a prefix cache because of another."""

    def write(self, path: Path) -> None:
        """One JSON object a line, for the `timed_trace` data set of vLLM's generator.

        Prompts are random tokens; every chunk has a hash id of its own, so no prompt is found in a prefix cache.
        """
        chunks = max(-(-request.input_tokens // CHUNK_TOKENS) for request in self.requests)
        with path.open("w") as file:
            for number, request in enumerate(self.requests):
                first = (self.number << 24) + number * chunks
                line = {
                    "timestamp": request.at_s,
                    "input_length": request.input_tokens,
                    "output_length": request.output_tokens,
                    "hash_ids": list(range(first, first + chunks)),
                }
                file.write(json.dumps(line) + "\n")


def make_trace(workload: Workload, seed: int) -> Trace:
    """The trace of `workload` that belongs to `seed`."""
    random, count = np.random.default_rng(seed), workload.requests
    fields = zip(
        _arrivals(workload, random),
        _models(workload, random),
        workload.input_tokens.draw(random, count),
        workload.output_tokens.draw(random, count),
        strict=True,
    )
    return Trace(tuple(Request(*each) for each in fields), workload.concurrency, crc32(f"{workload} {seed}".encode()))


def together(*traces: Trace) -> Trace:
    """Several traces at once, as one (open loops only)."""
    requests = sorted((request for trace in traces for request in trace.requests), key=lambda request: request.at_s)
    return Trace(tuple(requests), None, traces[0].number)


def zipf_weights(count: int, exponent: float) -> npt.NDArray[np.float64]:
    """Probability of each of `count` models, shape [count]."""
    weights = np.arange(1, count + 1, dtype=np.float64) ** -exponent
    normalised: npt.NDArray[np.float64] = weights / weights.sum()
    return normalised


def _models(workload: Workload, random: np.random.Generator) -> Sequence[str]:
    names = workload.models
    if workload.zipf is None:
        return [names[number % len(names)] for number in range(workload.requests)]
    drawn = random.choice(len(names), workload.requests, p=zipf_weights(len(names), workload.zipf))
    return [names[number] for number in drawn]


def _arrivals(workload: Workload, random: np.random.Generator) -> list[float]:
    if workload.rate is None:
        return [0.0] * workload.requests
    shape = 1 / workload.burstiness
    gaps = random.gamma(shape, 1 / (workload.rate * shape), workload.requests)
    return [float(at) for at in np.cumsum(gaps) - gaps[0]]
