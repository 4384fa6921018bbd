"""How near one model's log-probabilities are to another's, chunk by chunk; those of the reference lie on disk.

It knows no models: what it gets are log-probabilities [tokens, vocabulary] in fp32 and the tokens that came.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from adapters.merge.report import Closeness

Chunks = Iterable[tuple[Tensor, Tensor]]


class Reference:
    """What the first model that is judged says of one set of texts, in a file: 4 bytes for each token and word."""

    def __init__(self, file: Path, tokens: int) -> None:
        self._file = file
        self._tokens = tokens
        self._complete = False

    def judge(self, chunks: Chunks) -> Closeness:
        """The first is kept, and judged by itself: what is known of it is its loss."""
        (found,) = judged(chunks, [self])
        return found

    def complete(self, tokens: int) -> None:
        assert tokens == self._tokens, (tokens, self._tokens)
        self._complete = True

    def expected(self, found: Tensor, place: int) -> Tensor:
        """Read and written, not mapped: what is mapped stays in memory as long as there is room."""
        if not self._complete:
            with self._file.open("ab" if place else "wb") as file:
                found.numpy().tofile(file)
            return found
        begins = 4 * place * found.shape[1]
        return torch.from_numpy(np.fromfile(self._file, np.float32, found.numel(), offset=begins)).view(found.shape)


def judged(chunks: Chunks, references: Sequence[Reference]) -> list[Closeness]:
    """By each of them; the chunks are only there once."""
    sums = [_Sums(each) for each in references]
    for found, tokens in chunks:
        for each in sums:
            each.add(found, tokens)
    return [each.closeness() for each in sums]


class _Sums:
    def __init__(self, reference: Reference) -> None:
        self._reference = reference
        self._place = self._same = 0
        self._loss = self._divergence = self._change = self._largest = self._difference = self._squares = 0.0

    def add(self, found: Tensor, tokens: Tensor) -> None:
        expected = self._reference.expected(found, self._place)
        self._place += len(found)
        own, theirs = (each.gather(1, tokens[:, None]).squeeze(1) for each in (found, expected))
        differences = (own - theirs).double()
        changes = differences.abs()
        self._difference += float(differences.sum())
        self._squares += float(differences.square().sum())
        self._loss -= float(own.sum(dtype=torch.float64))
        self._divergence += float(kl(expected, found).sum(dtype=torch.float64))
        self._change += float(changes.sum(dtype=torch.float64))
        self._largest = max(self._largest, float(changes.max()))
        self._same += int((found.argmax(dim=-1) == expected.argmax(dim=-1)).sum())

    def closeness(self) -> Closeness:
        self._reference.complete(self._place)
        return Closeness(
            loss=self._loss / self._place,
            kl=max(self._divergence / self._place, 0.0),
            mean_change=self._change / self._place,
            largest_change=self._largest,
            same_top=self._same / self._place,
            loss_error=self._error(),
        )

    def _error(self) -> float:
        """The sample's standard deviation by the root of its size; of one token nothing is known."""
        count = self._place
        if count < 2:
            return 0.0
        scatter = max(self._squares - self._difference**2 / count, 0.0)
        return math.sqrt(scatter / (count - 1) / count)


def kl(reference: Tensor, found: Tensor) -> Tensor:
    """Of rows of log-probabilities, in nats; what the reference never says counts nothing."""
    difference = (reference - found).masked_fill_(reference.isneginf(), 0.0)
    return difference.mul_(reference.exp()).sum(dim=-1)
