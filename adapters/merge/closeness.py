"""How near one model's log-probabilities are to another's, chunk by chunk; those of the reference lie on disk.

It knows no models: what it gets are log-probabilities [tokens, vocabulary] in fp32 and the tokens that came.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from adapters.merge.report import Closeness

Chunks = Iterable[tuple[Tensor, Tensor]]


class Reference:
    """What the first model that is judged says of one set of texts, in a file: 4 bytes for each token and word."""

    def __init__(self, file: Path, tokens: int) -> None:
        self._file = file
        self._tokens = tokens
        self._rows: Tensor | None = None
        self._complete = False

    def judge(self, chunks: Chunks) -> Closeness:
        """The first is kept, and judged by itself: what is known of it is its loss."""
        place = same = 0
        loss = divergence = change = largest = 0.0
        for found, tokens in chunks:
            expected = self._expected(found, place)
            place += len(found)
            own, theirs = (each.gather(1, tokens[:, None]).squeeze(1) for each in (found, expected))
            changes = (own - theirs).abs()
            loss -= float(own.sum(dtype=torch.float64))
            divergence += float(kl(expected, found).sum(dtype=torch.float64))
            change += float(changes.sum(dtype=torch.float64))
            largest = max(largest, float(changes.max()))
            same += int((found.argmax(dim=-1) == expected.argmax(dim=-1)).sum())
        assert place == self._tokens, (place, self._tokens)
        self._complete = True
        return Closeness(loss / place, max(divergence / place, 0.0), change / place, largest, same / place)

    def _expected(self, found: Tensor, place: int) -> Tensor:
        if self._rows is None:
            shape = (self._tokens, found.shape[-1])
            self._rows = torch.from_file(str(self._file), shared=True, size=math.prod(shape)).view(shape)
        rows = self._rows[place : place + len(found)]
        if not self._complete:
            rows.copy_(found)
        return rows


def kl(reference: Tensor, found: Tensor) -> Tensor:
    """Of rows of log-probabilities, in nats; what the reference never says counts nothing."""
    difference = torch.where(reference.isneginf(), 0.0, reference - found)
    return (reference.exp() * difference).sum(dim=-1)
