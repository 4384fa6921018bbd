"""train check: the data as a run would train them, with every gate, in numbers and in colour; no weight is loaded."""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.markup import escape

from adapters.train.config import TrainConfig
from adapters.train.quiet import quiet_libraries
from adapters.train.verbs import configuration

HELP = "check configuration and data, and show what is trained, token by token"
WRONG_ROWS = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    configuration.add_arguments(parser)
    parser.add_argument("--show", type=int, default=1, metavar="N", help="rows to show token by token (default: 1)")


def execute(arguments: argparse.Namespace, console: Console) -> None:
    show(configuration.configuration(arguments), arguments.show, Console())


def show(config: TrainConfig, rows: int, console: Console) -> int:
    """The tokens of the longest row. DataError where a gate refuses the data."""
    with quiet_libraries():
        from adapters.train import survey, viewer
        from adapters.train.model import load_tokenizer
        from adapters.train.prepare import prepare

        tokenizer = load_tokenizer(config.model)
        data = prepare(config.data, config.eval, tokenizer)
    for line in survey.lines(data.survey):
        console.print(escape(line), highlight=False)
    for reason in data.survey.skipped[:WRONG_ROWS]:
        console.print(f"[yellow]left out:[/] {escape(reason)}", soft_wrap=True, highlight=False)
    for drawn in viewer.draw_all(data.examples[: max(0, rows)], tokenizer):
        console.print()
        console.print(drawn, soft_wrap=True)
    return data.longest_row
