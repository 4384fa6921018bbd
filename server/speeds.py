"""How much faster one way is than another, from requests that were answered by each. Pure.

Under more load every way is slower, so only requests of a like load are compared. What was not measured is None; no
figure is invented.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from server.traffic import Sample

FEWEST = 5
"""Requests of either side, below which nothing is said."""


@dataclass(frozen=True)
class Gain:
    """`before` is the way that is left, `after` the one that is gone; medians of what was compared."""

    speedup: float
    """How many times as fast a token comes: above 1 is faster."""
    tpot_before_s: float
    tpot_after_s: float
    ttft_before_s: float | None
    ttft_after_s: float | None
    requests: int
    """Of those compared, the side that has fewer."""
    like_load: bool
    """Whether there were requests under a like load on both sides; else all were compared."""

    def to_json(self) -> dict[str, Any]:
        return {name: _rounded(value) for name, value in asdict(self).items()}


def compare(before: Iterable[Sample], after: Iterable[Sample]) -> Gain | None:
    """None where either side has too few."""
    old, new = (list(_timed(samples)) for samples in (before, after))
    if len(old) < FEWEST or len(new) < FEWEST:
        return None
    by_load, new_by_load = _by_load(old), _by_load(new)
    both = [load for load in by_load if load in new_by_load]
    like_load = sum(min(len(by_load[load]), len(new_by_load[load])) for load in both) >= FEWEST
    if like_load:
        old = [sample for load in both for sample in by_load[load]]
        new = [sample for load in both for sample in new_by_load[load]]
        speedup = _speedup(by_load, new_by_load, both)
    else:
        speedup = _tpot(old) / max(_tpot(new), 1e-9)
    return Gain(speedup, _tpot(old), _tpot(new), _ttft(old), _ttft(new), min(len(old), len(new)), like_load)


def typical(samples: Iterable[Sample]) -> float | None:
    """The median time from one token to the next, None where too few were timed."""
    timed = list(_timed(samples))
    return _tpot(timed) if len(timed) >= FEWEST else None


def _timed(samples: Iterable[Sample]) -> Iterable[Sample]:
    return (sample for sample in samples if sample.tpot_s is not None)


def _by_load(samples: Iterable[Sample]) -> dict[int, list[Sample]]:
    """1 · 2–3 · 4–7 · 8–15 · …"""
    found: dict[int, list[Sample]] = {}
    for sample in samples:
        found.setdefault(sample.load.bit_length(), []).append(sample)
    return found


def _speedup(old: Mapping[int, Sequence[Sample]], new: Mapping[int, Sequence[Sample]], loads: Sequence[int]) -> float:
    """The ratio at each load, weighed by how many requests it rests on."""
    weights = [min(len(old[load]), len(new[load])) for load in loads]
    ratios = [_tpot(old[load]) / max(_tpot(new[load]), 1e-9) for load in loads]
    return sum(weight * each for weight, each in zip(weights, ratios, strict=True)) / sum(weights)


def _tpot(samples: Sequence[Sample]) -> float:
    return median(sample.tpot_s for sample in samples if sample.tpot_s is not None)


def _ttft(samples: Sequence[Sample]) -> float | None:
    return median([sample.ttft_s for sample in samples if sample.ttft_s is not None] or [0.0]) or None


def _rounded(value: Any) -> Any:
    return round(value, 5) if isinstance(value, float) else value
