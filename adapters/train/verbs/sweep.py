"""train sweep: the same data and steps over rank × modules × alpha; a table, a picture, and the best of them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from adapters.errors import ConfigError
from adapters.train.charts import draw_sweep
from adapters.train.config import TrainConfig
from adapters.train.grid import DOUBLE, RESULTS, Result, points, sweep
from adapters.train.quiet import quiet_libraries
from adapters.train.verbs import configuration

HELP = "short runs over rank × modules × alpha: a table and a picture; goes on where it was stopped"
PICTURE = "sweep.png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    configuration.add_arguments(parser)
    parser.add_argument("--r", type=int, nargs="+", default=[1, 2, 4, 8], metavar="RANK")
    parser.add_argument(
        "--targets",
        nargs="+",
        default=["attention-qv", "attention", "all-linear"],
        metavar="TARGETS",
        help="presets, or module names joined by +, as in q_proj q_proj+v_proj all-linear",
    )
    parser.add_argument("--alpha", nargs="+", default=[DOUBLE], help=f"numbers, or {DOUBLE} for twice the rank")
    parser.add_argument("--steps", type=int, metavar="N", help="short for --set training.max_steps=N")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="results; a second call goes on from them"
    )


def execute(arguments: argparse.Namespace, console: Console) -> None:
    if arguments.steps:
        arguments.set = [*arguments.set, f"training.max_steps={arguments.steps}"]
    config = configuration.configuration(arguments)
    wanted = points(arguments.targets, arguments.r, arguments.alpha)
    console.print(f"{len(wanted)} runs of the same data, seed and steps")
    results = sweep(config, wanted, arguments.out, run, lambda result: console.print(_line(result)))
    Console().print(table(results))
    finished = [result for result in results if result.loss is not None]
    if not finished:
        raise ConfigError("every run diverged; lower training.learning_rate")
    draw_sweep(_curves(finished), finished[0].base or 0.0, arguments.out / PICTURE)
    best = min(finished, key=lambda result: result.loss or 0.0)
    console.print(f"lowest: {_line(best)}")
    console.print(f"results in {escape(str(arguments.out / RESULTS))}, drawn in {PICTURE} beside it", soft_wrap=True)


def run(config: TrainConfig) -> tuple[float, float, float]:
    with quiet_libraries():
        from adapters.train.recipe import train

        trained = train(config)
    seconds = sum(step.seconds for step in trained.steps)
    return trained.verdict.held_out_base, trained.verdict.held_out_adapter, seconds


def table(results: Sequence[Result]) -> Table:
    """As in the LoRA paper: a row for a choice of modules and alpha, a column for a rank; held-out loss, and below it
    how many parameters that trains."""
    ranks = sorted({result.r for result in results})
    shown = Table("modules", "alpha", *(f"r = {rank}" for rank in ranks))
    lowest = min((result.loss for result in results if result.loss is not None), default=None)
    for targets, alpha in dict.fromkeys((result.targets, result.alpha) for result in results):
        cells = {result.r: result for result in results if (result.targets, result.alpha) == (targets, alpha)}
        shown.add_row(targets, alpha, *(_cell(cells.get(rank), lowest) for rank in ranks))
    return shown


def _cell(result: Result | None, lowest: float | None) -> str:
    if result is None:
        return ""
    if result.loss is None:
        return "diverged"
    mark = "[bold]" if result.loss == lowest else ""
    return f"{mark}{result.loss:.3f}{'[/]' if mark else ''} [dim]{result.parameters / 1e6:.2f} M[/]"


def _line(result: Result) -> str:
    found = "diverged" if result.loss is None else f"held-out loss {result.loss:.3f}, {result.seconds:.0f} s"
    return f"{result.targets} r={result.r} alpha={result.alpha} ({result.parameters:,} parameters): {found}"


def _curves(results: Sequence[Result]) -> dict[str, list[tuple[int, float]]]:
    curves: dict[str, list[tuple[int, float]]] = {}
    for result in sorted(results, key=lambda result: result.r):
        if result.loss is not None:
            curves.setdefault(f"{result.targets}, alpha {result.alpha}", []).append((result.r, result.loss))
    return curves
