"""A report for the terminal: a table of the variants, one of what each format keeps, and the advice."""

from __future__ import annotations

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from adapters.merge.advice import advice
from adapters.merge.report import FidelityReport, Judgement, VariantReport

SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "q8_0": "q8_0", "nf4": "NF4"}
ONTO = {"dequantized": "dequantised", "original": "original"}
BASE = {"dequantized": "NF4 base", "original": "16-bit base"}


def show(report: FidelityReport, judgement: Judgement, output: Console) -> None:
    output.print(variants_table(report))
    output.print(formats_table(report))
    output.print(escape(advice(report)), soft_wrap=True)
    if report.whole:
        output.print(f"· whole models were in memory, one at a time: {escape(report.whole)}", soft_wrap=True)
    for reason in judgement.reasons:
        output.print(f"[red]above the budget:[/] {escape(reason)}", soft_wrap=True)


def label(variant: VariantReport) -> str:
    """Short, for a row or a bar."""
    stored = SHORT[variant.stored]
    base = BASE[variant.base]
    if variant.part == "adapter":
        return f"{base} + adapter, {stored}"
    if variant.part == "base":
        return f"{base} alone"
    return f"merged, {ONTO[variant.base]}, {stored}"


def variants_table(report: FidelityReport) -> Table:
    texts = f"{report.task_tokens} tokens: {report.probes}; {report.general_tokens} of general text"
    shown = Table(title=escape(texts), title_justify="left", box=SIMPLE, pad_edge=False)  # else wider than 80 columns
    shown.add_column("nats per token", no_wrap=True)
    for heading in ("loss", "KL", "mean |Δ|", "max |Δ|", "top 1", "general"):
        shown.add_column(heading, justify="right")
    for variant in report.variants:
        task = variant.task
        shown.add_row(
            label(variant),
            f"{task.loss:.3f}",
            f"{task.kl:.4f}",
            f"{task.mean_change:.3f}",
            f"{task.largest_change:.2f}",
            f"{task.same_top:.1%}",
            f"{variant.general.loss:.3f}",
            style="bold" if variant.name == report.judged else None,
        )
    return shown


def formats_table(report: FidelityReport) -> Table:
    shown = Table("of the change of the weights", box=SIMPLE, pad_edge=False)
    for heading in ("kept", "worst tensor", "noise / change"):
        shown.add_column(heading, justify="right")
    for each in sorted(report.formats, key=lambda each: each.base != report.onto):
        where = f"{SHORT[each.stored]}, merged onto {ONTO[each.base]}"
        shown.add_row(where, f"{each.kept:.1%}", f"{each.least_kept:.1%}", f"{each.noise:.3f}")
    return shown
