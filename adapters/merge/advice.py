"""A report in a few plain sentences: what the merge costs, which base to take, and whether four bits would do."""

from __future__ import annotations

from collections.abc import Iterator

from adapters.merge.report import FidelityReport, VariantReport

PLAIN = {"dequantized": "the dequantised NF4 base", "original": "the original base"}
SAME_LOSS = 0.02
"""Nats per token below which two losses are called the same."""


def advice(report: FidelityReport) -> str:
    return " ".join((*_the_merge(report), *_the_other_base(report), *_four_bits(report)))


def lost(report: FidelityReport, variant: VariantReport) -> float | None:
    """What share of the adapter's gain on the task a variant gives away; None where the adapter has no gain."""
    bare = report.variant("base", report.trained_on, "bfloat16")
    gain = (bare.task.loss - report.reference.task.loss) if bare else 0.0
    return (variant.task.loss - report.reference.task.loss) / gain if gain > SAME_LOSS else None


def _the_merge(report: FidelityReport) -> Iterator[str]:
    found, rounding = report.named(report.judged), report.variant("adapter", report.trained_on, "bfloat16")
    if found is None:
        return
    compared = f"; the adapter path itself in bf16 is {rounding.task.kl:.4f} off" if rounding else ""
    yield f"Merged onto {PLAIN[found.base]} it is {found.task.kl:.4f} nats per token from the adapter{compared}."


def _the_other_base(report: FidelityReport) -> Iterator[str]:
    """Of the 16-bit merges, because the base is what differs."""
    here, other = (report.variant("merged", base, "bfloat16") for base in (report.onto, _other(report.onto)))
    if here is None or other is None:
        return
    yield (
        f"Onto {PLAIN[other.base]} it is {other.task.kl:.3f} off, with {_against(other.task.loss, here.task.loss)} "
        f"on the task and {_against(other.general.loss, here.general.loss)} on general text."
    )


def _four_bits(report: FidelityReport) -> Iterator[str]:
    fours = [variant for variant in report.variants if variant.stored == "nf4"]
    if not fours:
        return
    best = min(fours, key=lambda variant: variant.task.kl)
    told = [f"{_kept(report, each)} from {PLAIN[each.base]} ({each.task.kl:.3f} off)" for each in fours]
    yield f"Quantised to NF4 again it keeps {' and '.join(told)}: {_verdict(report, best)}."


def _verdict(report: FidelityReport, best: VariantReport) -> str:
    share = lost(report, best)
    if best.task.kl <= 0.01 and (share is None or share < 0.02):
        return "four bits will do"
    if share is not None and share > 0.5:
        return "four bits lose the adapter, keep 16"
    return f"if it must be four bits, quantise the merge onto {PLAIN[best.base]}"


def _kept(report: FidelityReport, variant: VariantReport) -> str:
    found = report.format("nf4", variant.base)
    return "an unknown share of the change" if found is None else f"{found.kept:.1%} of the change"


def _against(own: float, theirs: float) -> str:
    if abs(own - theirs) < SAME_LOSS:
        return "the same loss"
    return f"{abs(own - theirs):.2f} {'more' if own > theirs else 'less'} loss"


def _other(base: str) -> str:
    return "original" if base == "dequantized" else "dequantized"
