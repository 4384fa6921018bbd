"""What an epoch is made of: rows as often as their files' weights say, and a share of general data by tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

from adapters.errors import DataError
from adapters.train.labels import Example


def by_weight(examples: Sequence[Example]) -> list[Example]:
    """Weight 2 is twice; of a weight's fraction, that share of the rows, chosen by their tokens and not their order."""
    chosen = [example for example in examples for _ in range(_times(example))]
    if not chosen:
        raise DataError("the weights of data.train leave no row to train; raise them")
    return chosen


def replayed(general: Sequence[Example], tokens: int, ratio: float) -> list[Example]:
    """As many of the general rows, from the first, as make up `ratio` of an epoch with `tokens` of the task's own."""
    wanted = ratio / (1 - ratio) * tokens
    chosen = list(_until(general, wanted))
    if (got := token_count(chosen)) < wanted:
        raise DataError(
            f"data.replay: a ratio of {ratio} of an epoch needs {round(wanted)} tokens, and the file has {got}; "
            f"add rows, or set data.replay.ratio={got / (got + tokens):.3f}"
        )
    return chosen


def token_count(examples: Sequence[Example]) -> int:
    return sum(len(example.ids) for example in examples)


def _until(general: Sequence[Example], wanted: float) -> Iterator[Example]:
    total = 0
    for example in general:
        if total >= wanted:
            return
        total += len(example.ids)
        yield example


def _times(example: Example) -> int:
    whole = int(example.weight)
    digest = hashlib.sha256(repr(example.ids).encode()).digest()
    return whole + (int.from_bytes(digest[:8]) / 2**64 < example.weight - whole)
