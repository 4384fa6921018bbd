"""The figures that promotions are decided and judged by: what the policy wants to know of a version, and whether an
engine that was built is worth keeping. It reads traffic and stories, and changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adapters.promotions import DEMOTED, UNHAPPY, Promotion
from server.promotion_policy import Past, Prediction
from server.settings import Settings
from server.speeds import FEWEST, Gain, compare, typical
from server.traffic import Sample, Traffic

KNOWN_S = 86_400.0
"""How long it is believed what an earlier engine gained."""
BEFORE_S = 1800.0
"""How old requests may be that the LoRA path is measured by."""


@dataclass(frozen=True)
class Verdict:
    keeps: bool
    reason: str
    figures: Mapping[str, Any]


def predict(traffic: Traffic, ref: str, known_speedup: float | None) -> Prediction:
    """`known_speedup`: of a merged engine, from an earlier story. A like load is compared where there was one."""
    lora = traffic.samples(ref, "lora")
    if (gain := compare(lora, traffic.samples_of("merged"))) is not None:
        return Prediction(gain.tpot_before_s, gain.tpot_after_s, "measured")
    if known_speedup and (tpot_s := typical(lora)) is not None:
        return Prediction(tpot_s, tpot_s / known_speedup, "measured")
    if (gain := compare(lora, traffic.samples(None, "base"))) is not None:
        return Prediction(gain.tpot_before_s, gain.tpot_after_s, "proxy")
    return Prediction(typical(lora))


def judge(
    traffic: Traffic, ref: str, switched_at: float, wanted: int, least_speedup: float, conditions: str
) -> Verdict | None:
    """Of an engine that answers since `switched_at`; None until `wanted` requests are measured."""
    before = traffic.samples(ref, "lora", switched_at - BEFORE_S)
    after = traffic.samples(ref, "merged", switched_at)
    timed = _timed(after)
    if timed < wanted:
        return None
    gain = compare(before, after)
    if gain is None:
        counts = f"{_timed(before)} requests by LoRA before and {timed} by the merged engine were timed"
        return Verdict(True, f"kept, its gain is not known: {counts}, {FEWEST} of each are needed", {"measured": None})
    told = f"{gain.speedup:.2f} times as fast as by LoRA before: {_milliseconds(gain)}, {_how(gain)}"
    figures = {"measured": gain.to_json() | {"conditions": conditions}}
    if gain.speedup < least_speedup:
        return Verdict(False, f"rolled back: {told}, at least {least_speedup:g} is asked for", figures)
    return Verdict(True, f"kept: {told}", figures)


def past_of(ref: str, stories: Sequence[Promotion]) -> Past | None:
    """`stories`: those that have ended, the newest first. None where the last one ended well, or there is none."""
    failures, ended_at = 0, 0.0
    for story in stories:
        if story.ref != ref or story.ended_at is None:
            continue
        if story.state == DEMOTED:
            break
        if story.state in UNHAPPY:
            failures += 1
            ended_at = max(ended_at, story.ended_at.timestamp())
    return Past(failures, ended_at) if failures else None


def measured_speedup(stories: Sequence[Promotion], conditions: str, since: float) -> float | None:
    """Of the merged engine that was measured last under these conditions. `stories`: the newest first."""
    for story in stories:
        measured = story.figures.get("measured")
        if measured and measured["conditions"] == conditions and story.created_at.timestamp() >= since:
            return float(measured["speedup"])
    return None


def conditions_of(settings: Settings) -> str:
    """What decides how fast engines are here; what was measured under others says nothing."""
    computed = f"{settings.device}, {settings.quantization}, {settings.dtype}, {settings.cpu_threads} threads"
    merged = "" if settings.merged_quantization == "none" else f", merged in {settings.merged_quantization}"
    return computed + merged + (", compiled" if settings.compiles else "")


def _milliseconds(gain: Gain) -> str:
    return f"{1e3 * gain.tpot_before_s:.1f} ms a token before, {1e3 * gain.tpot_after_s:.1f} ms now"


def _how(gain: Gain) -> str:
    return f"{gain.requests} requests " + ("under a like load" if gain.like_load else "under different loads")


def _timed(samples: Sequence[Sample]) -> int:
    return sum(sample.tpot_s is not None for sample in samples)
