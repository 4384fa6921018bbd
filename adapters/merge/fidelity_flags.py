"""The flags that say what a merge is measured on and what it may lose; of `loraplex merge` and `loraplex fidelity`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from adapters.merge.report import MAX_KL, MAX_LOSS_INCREASE, Budget, Told
from adapters.merge.verify import TOKENS, Wishes


def add_arguments(parser: argparse._ArgumentGroup) -> None:
    parser.add_argument(
        "--data",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="rows of the task, as for training; may be repeated; default: those that the adapter held out, or our own",
    )
    parser.add_argument("--general", type=Path, metavar="FILE", help="rows of general text (default: our own)")
    parser.add_argument(
        "--tokens",
        type=_count,
        default=TOKENS,
        metavar="N",
        help="of the task, and half of general text (default: %(default)s)",
    )
    parser.add_argument(
        "--max-kl",
        type=float,
        metavar="NATS",
        help=f"per token, from the adapter to its merge; bf16 costs 0.001, a wrong base 0.1 (default: {MAX_KL})",
    )
    parser.add_argument(
        "--max-loss-increase",
        type=float,
        metavar="NATS",
        help=f"per token, on the task and on general text (default: {MAX_LOSS_INCREASE})",
    )
    parser.add_argument("--accept-loss", action="store_true", help="do it although it is above that")


def wishes(arguments: argparse.Namespace) -> Wishes:
    return Wishes(
        data=tuple(arguments.data),
        general=arguments.general,
        tokens=arguments.tokens,
        budget=Budget(arguments.max_kl, arguments.max_loss_increase),
        accept_loss=arguments.accept_loss,
    )


@contextmanager
def bar(console: Console) -> Iterator[Progress]:
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("ETA"), TimeRemainingColumn(), console=console, transient=True) as progress:
        yield progress


def told_by(progress: Progress) -> Told:
    """A line for what is measured and how much of the whole is done, from the first word on."""
    tasks: list[TaskID] = []

    def told(what: str, done: int, of: int) -> None:
        if not tasks:
            tasks.append(progress.add_task("measuring"))
        progress.update(tasks[0], description=f"measuring: {what}", completed=done, total=of)

    return told


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {count}")
    return count
