"""Outcomes → figures: percentiles of TTFT, inter-token and whole latency; rates, goodput, ratios with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from loadtests.generator import Outcome

# Student's t for a two-sided interval of 95 %, by degrees of freedom from 1. Not from scipy: where that is installed
# vLLM and transformers import it, in each of their processes.
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
T_95_MANY = 2.12
"""Of 16 degrees of freedom: a little wide for more."""


@dataclass(frozen=True)
class Percentiles:
    p50: float
    p95: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Percentiles:
        return cls(*(float(value) for value in np.percentile(values, (50, 95, 99))))


@dataclass(frozen=True)
class Slo:
    """What a request must keep to count: first token, and time per output token after it. Seconds."""

    ttft_s: float
    tpot_s: float

    def kept_by(self, outcome: Outcome) -> bool:
        return outcome.ttft_s <= self.ttft_s and outcome.tpot_s <= self.tpot_s


@dataclass(frozen=True)
class Figures:
    """Of the requests of one replay. Seconds, and tokens or requests a second."""

    requests: int
    ttft_s: Percentiles
    itl_s: Percentiles
    latency_s: Percentiles
    output_tokens_per_s: float
    """Generated tokens over the time from the first request sent to the last token received."""
    decode_tokens_per_s: float
    """Generated tokens but the first of each answer, over the time from the first first token to the last token."""
    goodput_per_s: float
    """Requests within the SLO over the same time as `output_tokens_per_s`."""

    @classmethod
    def of(cls, outcomes: Sequence[Outcome], slo: Slo) -> Figures:
        end = max(outcome.end_s for outcome in outcomes)
        started = min(outcome.start_s for outcome in outcomes)
        first_token = min(outcome.start_s + outcome.ttft_s for outcome in outcomes)
        tokens = sum(outcome.output_tokens for outcome in outcomes)
        intervals = [interval for outcome in outcomes for interval in outcome.itl_s]
        decoding = end - first_token
        return cls(
            requests=len(outcomes),
            ttft_s=Percentiles.of([outcome.ttft_s for outcome in outcomes]),
            itl_s=Percentiles.of(intervals or [0.0]),
            latency_s=Percentiles.of([outcome.latency_s for outcome in outcomes]),
            output_tokens_per_s=tokens / (end - started),
            decode_tokens_per_s=(tokens - len(outcomes)) / decoding if decoding else 0.0,
            goodput_per_s=sum(slo.kept_by(outcome) for outcome in outcomes) / (end - started),
        )


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % confidence interval; both bounds are the mean when there is one value only."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """Of repetitions of one measurement, by Student's t distribution."""
        mean = float(np.mean(values))
        if len(values) < 2:
            return cls(mean, mean, mean)
        freedom = len(values) - 1
        t = T_95[freedom - 1] if freedom <= len(T_95) else T_95_MANY
        reach = t * float(np.std(values, ddof=1)) / len(values) ** 0.5
        return cls(mean, mean - reach, mean + reach)


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Interval:
    """ours / theirs, geometric mean over the pairs: repetition i of both answered the same trace."""
    logs = Interval.of([float(np.log(a / b)) for a, b in zip(ours, theirs, strict=True)])
    return Interval(*(float(np.exp(bound)) for bound in (logs.mean, logs.low, logs.high)))


def by_model(outcomes: Sequence[Outcome]) -> Mapping[str, list[Outcome]]:
    """The outcomes of each model, the busiest first."""
    found: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        found.setdefault(outcome.model, []).append(outcome)
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))
