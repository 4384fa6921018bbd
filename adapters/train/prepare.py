"""FLOW data: read → hold out → refuse leaks → encode → gates → weights → replay → pack.

All of it happens before the base is loaded. Rows are held out before anything else is done with them, so that nothing
held out is ever trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from adapters.train import gates
from adapters.train.data import Conversation, Split, split_by_hash, without_copies
from adapters.train.labels import Example, encode_all
from adapters.train.mixing import by_weight, replayed, token_count
from adapters.train.packing import pack
from adapters.train.reading import Reading, read_files
from adapters.train.sections import DataFile, DataSection, EvalSection
from adapters.train.survey import Survey, survey_of


@dataclass(frozen=True)
class Rows:
    """Conversations by what is done with them."""

    split: Split
    replay: tuple[Conversation, ...]
    general: tuple[Conversation, ...]
    skipped: tuple[str, ...]
    leaked: int


@dataclass(frozen=True)
class Prepared:
    split: Split
    examples: list[Example]
    """Of the task, one a row; what the label viewer shows."""
    epoch: list[Example]
    """What one pass trains: weighted, with replay, packed."""
    held_out: list[Example]
    general: list[Example]
    survey: Survey

    @property
    def longest_row(self) -> int:
        """Tokens of it, as the model gets it."""
        return max(len(example.ids) for example in (*self.epoch, *self.held_out, *self.general))


def prepare(data: DataSection, evaluation: EvalSection, tokenizer: Any) -> Prepared:
    """DataError says all that is wrong, with places."""
    rows = gather(data, evaluation)
    encoded = _encode(rows.split.train, tokenizer, data)
    held_out = _encode(rows.split.held_out, tokenizer, data)
    gates.refuse(
        [
            *gates.lengths(encoded, data),
            *gates.untrained(encoded, data),
            *gates.untrained(held_out, data),
            *gates.ends(encoded, data),
        ]
    )
    examples = _trained(encoded)
    task = by_weight(examples)
    replay = _trained(_encode(rows.replay, tokenizer, data))
    extra = replayed(replay, token_count(task), data.replay.ratio) if data.replay else []
    epoch = [*task, *extra]
    epoch = pack(epoch, data.max_length) if data.packing else epoch
    general = _trained(_encode(rows.general, tokenizer, data))
    survey = survey_of(
        examples,
        epoch,
        held_out=len(held_out),
        general=len(general),
        duplicates=rows.split.duplicates,
        skipped=rows.skipped,
        untrained=len(encoded) - len(examples),
        leaked=rows.leaked,
        replay_tokens=token_count(extra),
    )
    return Prepared(rows.split, examples, epoch, _trained(held_out), general, survey)


def gather(data: DataSection, evaluation: EvalSection) -> Rows:
    """Read every file, hold out, and see to it that nothing held out is trained."""
    train = _read(data, data.train)
    split, skipped = split_train(data, train)
    general: Sequence[Conversation] = ()
    replay: Sequence[Conversation] = ()
    if data.replay:
        reading = _read(data, [data.replay])
        skipped += reading.skipped
        replay = reading.conversations
        if evaluation.general_set is None:
            halves = split_by_hash(replay, data.eval_split)
            replay, general = halves.train, halves.held_out
    if evaluation.general_set:
        reading = _read(data, [evaluation.general_set])
        skipped += reading.skipped
        general, _ = without_copies(reading.conversations)
    replay = sorted(without_copies(replay)[0], key=lambda conversation: conversation.digest)
    leaks = gates.leaks([*split.train, *replay], [*split.held_out, *general])
    gates.refuse(
        [
            *gates.copies(split, len(train.conversations), data.gates),
            *(gates.leakage(leaks) if data.gates.leakage == "refuse" else ()),
        ]
    )
    dropped = leaks if data.gates.leakage == "drop" else {}
    split = replace(split, train=tuple(row for row in split.train if row.digest not in dropped))
    gates.refuse(gates.something(split))
    kept = tuple(row for row in replay if row.digest not in dropped)
    return Rows(split, kept, tuple(general), skipped, len(leaks))


def split_train(data: DataSection, train: Reading) -> tuple[Split, tuple[str, ...]]:
    """What is trained and what is held out, from one file or two; and what was wrong with rows of either."""
    if data.eval is None:
        return split_by_hash(train.conversations, data.eval_split), train.skipped
    rows, copies = without_copies(train.conversations)
    reading = _read(data, [data.eval])
    held_out, _ = without_copies(reading.conversations)
    in_order = tuple(sorted(rows, key=lambda row: row.digest))
    return Split(in_order, held_out, copies), train.skipped + reading.skipped


def _read(data: DataSection, files: Sequence[DataFile]) -> Reading:
    return read_files(
        files,
        max_skipped=data.max_skipped if data.on_error == "skip" else 0,
        empty_answers=data.gates.empty_answers == "allow",
    )


def _encode(rows: Sequence[Conversation], tokenizer: Any, data: DataSection) -> list[Example]:
    return encode_all(rows, tokenizer, data.max_length, data.train_on)


def _trained(examples: Sequence[Example]) -> list[Example]:
    return [example for example in examples if example.trained_tokens]
