"""train inspect: what an adapter does to the base's weights, as a table for each kind of module, and as a picture."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from adapters.base import BaseModel
from adapters.train.charts import draw_inspection
from adapters.train.inspection import Found, inspect

HELP = "what an adapter changes in each module: how much, in how many directions, and which"
PICTURE = "inspection.png"
SHOWN = 4
"""Singular values of a module that the table shows."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", type=Path, metavar="ADAPTER_DIR")
    parser.add_argument("--base", type=Path, required=True, metavar="MODEL_DIR", help="the base it was trained on")
    parser.add_argument("--modules", action="store_true", help="a line for each module, not only for each kind")
    parser.add_argument(
        "--png", type=Path, metavar="FILE", help=f"the picture; default: {PICTURE} beside the directory"
    )
    parser.add_argument("--json", action="store_true", help="print every figure of every module as JSON")


def execute(arguments: argparse.Namespace, console: Console) -> None:
    base = BaseModel.read(arguments.base)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("comparing with the base", total=None)
        found = inspect(arguments.adapter, base, lambda done, of: progress.update(task, completed=done, total=of))
    output = Console()
    if arguments.json:
        output.print_json(json.dumps([asdict(each) for each in found]), indent=None)
    else:
        output.print(table(found) if arguments.modules else summary(found))
    picture = arguments.png or arguments.adapter.with_name(f"{arguments.adapter.resolve().name}-{PICTURE}")
    draw_inspection(found, picture)
    console.print(f"drawn in {escape(str(picture))}", soft_wrap=True)


def table(found: Sequence[Found]) -> Table:
    shown = Table("module", "‖ΔW‖/‖W‖", "in use", "effective", "σ", "overlap (chance)", "amplification")
    for each in found:
        values = " ".join(f"{value:.3g}" for value in each.singular_values[:SHOWN])
        more = " …" if len(each.singular_values) > SHOWN else ""
        shown.add_row(
            each.module,
            f"{each.change:.3%}",
            f"{each.in_use} of {each.rank}",
            f"{each.effective:.1f}",
            values + more,
            f"{each.overlap:.3f} ({each.chance:.3f})",
            f"{each.amplification:.2f}",
        )
    return shown


def summary(found: Sequence[Found]) -> Table:
    """Means over the modules of one kind."""
    shown = Table(
        "module", "of them", "‖ΔW‖/‖W‖", "directions in use", "largest σ", "overlap (chance)", "amplification"
    )
    for kind in dict.fromkeys(each.module.rpartition(".")[2] for each in found):
        those = [each for each in found if each.module.rpartition(".")[2] == kind]

        def mean(figure: Callable[[Found], float], those: Sequence[Found] = those) -> float:
            return statistics.fmean(figure(each) for each in those)

        shown.add_row(
            kind,
            f"× {len(those)}",
            f"{mean(lambda each: each.change):.3%}",
            f"{mean(lambda each: each.in_use):.1f} of {mean(lambda each: each.rank):.0f}",
            f"{mean(lambda each: each.effective):.1f}",
            f"{mean(lambda each: each.singular_values[0]):.3g}",
            f"{mean(lambda each: each.overlap):.3f} ({mean(lambda each: each.chance):.3f})",
            f"{mean(lambda each: each.amplification):.2f}",
        )
    return shown
