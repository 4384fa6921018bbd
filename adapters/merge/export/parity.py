"""How near the log-probabilities of an export are to those of its source, token by token. Knows no model.

Rows are [tokens, vocabulary] in fp32; what the export's program did not list of a row is NaN. Those tokens share what
is left of it as they do in the source: the divergence is then that of the listed ones and of all others as one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from adapters.tensor_values import Matrix

LEAST = 1e-7
"""Of a probability that was found by taking others from 1: below that there is nothing but rounding."""


@dataclass(frozen=True)
class Parity:
    """Of an export and its source."""

    tokens: int
    kl: float
    """Mean, in nats: how much worse the export predicts what the source says."""
    mean_change: float
    """Of |Δ log-probability| of the tokens that came."""
    largest_change: float
    same_first: float
    """Share of the tokens of which both hold the same for the likeliest."""
    loss: float
    source_loss: float

    def record(self) -> Mapping[str, float]:
        return asdict(self)


def compare(source: Matrix, export: Matrix, came: Sequence[int]) -> Parity:
    filled = np.stack([_filled(theirs, own) for theirs, own in zip(source, export, strict=True)])
    chosen = np.arange(len(came)), np.asarray(came)
    changes = np.abs(filled[chosen] - source[chosen])
    with np.errstate(invalid="ignore"):
        gaps = np.where(source == filled, 0.0, source - filled)
    return Parity(
        tokens=len(came),
        kl=max(float((np.exp(source, dtype=np.float64) * gaps).sum(axis=1).mean()), 0.0),
        mean_change=float(changes.mean()),
        largest_change=float(changes.max()),
        same_first=float((filled.argmax(axis=1) == source.argmax(axis=1)).mean()),
        loss=float(-filled[chosen].mean()),
        source_loss=float(-source[chosen].mean()),
    )


def _filled(source: Matrix, export: Matrix) -> Matrix:
    missing = np.isnan(export)
    if not missing.any():
        return export
    left = 1.0 - float(np.exp(export[~missing], dtype=np.float64).sum())
    theirs = float(np.exp(source[missing], dtype=np.float64).sum())
    moved = math.log(max(left, LEAST)) - math.log(max(theirs, LEAST))
    return np.where(missing, source + np.float32(moved), export)
