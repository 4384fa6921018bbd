"""Hard gates: what is wrong with the data as a whole, each row with its place, before any weight is loaded.

Each gate yields what it found and how to let it through; `refuse` raises all of it at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from adapters.errors import DataError
from adapters.train.data import Conversation, Split
from adapters.train.labels import Example
from adapters.train.sections import DataSection, GatesSection

SHOWN = 5
"""Places that one gate names."""
LONG = 16
"""A row of so many times `max_length` is no row."""


def refuse(problems: Iterable[str]) -> None:
    if found := list(problems):
        raise DataError("\n".join(found))


def copies(split: Split, rows: int, section: GatesSection) -> Iterator[str]:
    if len(split.copies) > section.max_duplicates * rows:
        yield (
            f"{len(split.copies)} of {rows} rows are copies, more than data.gates.max_duplicates="
            f"{section.max_duplicates}: {_some(split.copies)}"
        )


def leaks(train: Sequence[Conversation], held_out: Sequence[Conversation]) -> dict[str, str]:
    """Digest of a conversation that is trained → where it is held out, too."""
    exact = {conversation.digest: conversation.place for conversation in held_out}
    near = {conversation.gist: conversation.place for conversation in held_out}
    found = {}
    for conversation in train:
        if place := exact.get(conversation.digest):
            found[conversation.digest] = f"{conversation.place} is {place}"
        elif place := near.get(conversation.gist):
            found[conversation.digest] = f"{conversation.place} is nearly {place}"
    return found


def something(split: Split) -> Iterator[str]:
    for what, rows in (("to train", split.train), ("held out", split.held_out)):
        if not rows:
            yield f"no row is left {what}; every one is a copy or a leak"


def leakage(found: dict[str, str]) -> Iterator[str]:
    if found:
        yield (
            f"{len(found)} rows are trained and held out, so that no loss on them means anything; "
            f"data.gates.leakage=drop trains without them: {_some(tuple(found.values()))}"
        )


def lengths(examples: Sequence[Example], section: DataSection) -> Iterator[str]:
    limit = section.gates.max_row_tokens or LONG * section.max_length
    if long := [f"{example.place} ({example.whole} tokens)" for example in examples if example.whole > limit]:
        yield (
            f"{len(long)} rows are longer than {limit} tokens, which looks like several rows run together "
            f"(data.gates.max_row_tokens): {_some(long)}"
        )
    cut = [f"{example.place} ({example.whole} tokens)" for example in examples if example.truncated]
    if len(cut) > section.gates.max_truncated * len(examples):
        yield (
            f"{len(cut)} of {len(examples)} rows are cut at data.max_length={section.max_length}, more than "
            f"data.gates.max_truncated={section.gates.max_truncated}; raise max_length or shorten them: {_some(cut)}"
        )


def untrained(examples: Sequence[Example], section: DataSection) -> Iterator[str]:
    """Of the rows to train, or of those held out: all of them cannot be dropped."""
    rows = [example.place for example in examples if not example.trained_tokens]
    if rows and (section.gates.untrained == "refuse" or len(rows) == len(examples)):
        yield (
            f"{len(rows)} rows have no token to train within data.max_length={section.max_length}; raise it, or "
            f"data.gates.untrained=drop leaves them out: {_some(rows)}"
        )


def ends(examples: Sequence[Example], section: DataSection) -> Iterator[str]:
    if section.gates.unended == "refuse" and not any(example.ends for example in examples):
        yield (
            f"no answer ends within data.max_length={section.max_length}, so the model would never learn to stop; "
            f"raise it, or data.gates.unended=allow: {_some([example.place for example in examples])}"
        )


def _some(places: Sequence[str]) -> str:
    more = f" and {len(places) - SHOWN} more" if len(places) > SHOWN else ""
    return ", ".join(places[:SHOWN]) + more
