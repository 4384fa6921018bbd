"""What the data are in numbers, for people to look at before they train. Pure: no file, no terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from adapters.train.labels import Example

BAR = 40
"""Characters of the longest bar."""


@dataclass(frozen=True)
class Survey:
    rows: int
    """Trained rows, before weights and replay."""
    held_out: int
    general: int
    tokens: int
    """Of the trained rows."""
    trained_tokens: int
    truncated: int
    duplicates: int
    skipped: tuple[str, ...]
    """What was wrong with each row that was left out."""
    untrained: int
    """Rows that were left out because nothing in them is trained."""
    leaked: int
    """Rows that were left out, or let in, because they are held out, too."""
    lengths: tuple[int, ...]
    """Of the trained rows in tokens, before they were cut."""
    epoch_sequences: int
    epoch_tokens: int
    replay_tokens: int

    @property
    def trained_share(self) -> float:
        return self.trained_tokens / self.tokens

    @property
    def replay_share(self) -> float:
        return self.replay_tokens / self.epoch_tokens


def lines(survey: Survey) -> Iterator[str]:
    """The survey as text, without markup."""
    left_out = {
        "copies": survey.duplicates,
        "wrong rows": len(survey.skipped),
        "with nothing to train": survey.untrained,
    }
    middle = sorted(survey.lengths)[len(survey.lengths) // 2]
    yield f"rows       {survey.rows} trained, {survey.held_out} held out, {survey.general} general"
    yield f"tokens     {survey.tokens}, of which {survey.trained_tokens} ({survey.trained_share:.0%}) are trained"
    yield f"epoch      {survey.epoch_sequences} sequences of {survey.epoch_tokens} tokens"
    yield f"replay     {survey.replay_tokens} tokens, {survey.replay_share:.1%} of the epoch"
    yield f"left out   {', '.join(f'{count} {what}' for what, count in left_out.items())}"
    yield f"leaked     {survey.leaked}"
    yield f"cut        {survey.truncated} rows"
    yield f"lengths    {min(survey.lengths)} to {max(survey.lengths)} tokens, the middle one {middle}"
    yield from histogram(survey.lengths)


def histogram(lengths: Sequence[int], bins: int = 8) -> Iterator[str]:
    """A line a bin of equal width, each with its bounds in tokens, a bar and a count."""
    low, high = min(lengths), max(lengths)
    width = max(1, -(-(high - low + 1) // bins))
    counts = [0] * (-(-(high - low + 1) // width))
    for length in lengths:
        counts[(length - low) // width] += 1
    digits = len(str(high + width))
    for number, count in enumerate(counts):
        start = low + number * width
        bar = "█" * round(BAR * count / max(counts)) or ("▏" if count else "")
        yield f"{start:>{digits}}–{start + width - 1:<{digits}} {bar} {count}"


def survey_of(
    examples: Sequence[Example],
    epoch: Sequence[Example],
    *,
    held_out: int,
    general: int,
    duplicates: int,
    skipped: tuple[str, ...],
    untrained: int,
    leaked: int,
    replay_tokens: int,
) -> Survey:
    return Survey(
        rows=len(examples),
        held_out=held_out,
        general=general,
        tokens=sum(len(example.ids) for example in examples),
        trained_tokens=sum(example.trained_tokens for example in examples),
        truncated=sum(example.truncated for example in examples),
        duplicates=duplicates,
        skipped=skipped,
        untrained=untrained,
        leaked=leaked,
        lengths=tuple(example.whole for example in examples),
        epoch_sequences=len(epoch),
        epoch_tokens=sum(len(example.ids) for example in epoch),
        replay_tokens=replay_tokens,
    )
