"""train estimate: the memory a run will take, term by term, for full fine-tuning, LoRA and QLoRA. Loads nothing."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from adapters.errors import ConfigError
from adapters.train.config import TrainConfig, config_of_model, load_config
from adapters.train.forecast import FULL, LORA, QLORA, Forecast, forecast, require_fit
from adapters.train.memory import limit_bytes, parse_bytes
from adapters.train.quoted import quoted_figures

HELP = "memory before the run, term by term"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, nargs="?", metavar="CONFIG.yaml")
    parser.add_argument(
        "--model", type=Path, metavar="PATH", help="in place of CONFIG.yaml: a model or its config.json"
    )
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override one key")
    parser.add_argument("--quoted", action="store_true", help="often quoted figures, and which are wrong")
    add_memory(parser)


def add_memory(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--memory", metavar="24GB", help="how much there is; default: what this machine or cgroup has")
    parser.add_argument("--ignore-memory", action="store_true", help="go on where the estimate says it would not fit")


def execute(arguments: argparse.Namespace, console: Console) -> None:
    if arguments.quoted:
        Console().print(_quoted())
    if arguments.config or arguments.model:
        found = forecast(_configuration(arguments))
        show(found, limit_of(arguments), Console())
        require_fit(found, limit_of(arguments), ignore=arguments.ignore_memory)
    elif not arguments.quoted:
        raise ConfigError("give a CONFIG.yaml, or --model with a model directory or a config.json")


def limit_of(arguments: argparse.Namespace) -> int:
    return parse_bytes(arguments.memory) if arguments.memory else limit_bytes()


def show(found: Forecast, limit: int, console: Console) -> None:
    console.print(table(found))
    share = found.trained / (found.architecture.parameters + found.trained)
    console.print(
        f"{found.architecture.parameters:,} parameters, {found.trained:,} trained with an adapter ({share:.3%}); "
        f"batch {found.load.batch} × {found.load.tokens} tokens at most, {found.load.optimizer}. "
        f"{found.chosen} takes [bold]{in_words(found.needed)}[/] of {in_words(limit)}"
        + (f", at its peak {in_words(found.total)} with its file." if found.total > found.needed else ".")
    )
    if found.chosen == QLORA and found.total > 0.95 * found.terms[LORA].total:
        console.print("[yellow]4 bits save next to nothing here: activations and logits weigh more than the weights[/]")


def table(found: Forecast) -> Table:
    shown = Table("", FULL, LORA, QLORA)
    for column in shown.columns[1:]:
        column.justify = "right"
    for name in vars(found.terms[FULL]):
        shown.add_row(name.replace("_", " "), *(in_words(getattr(terms, name)) for terms in found.terms.values()))
    shown.add_section()
    shown.add_row("sum", *(f"[bold]{in_words(terms.total)}[/]" for terms in found.terms.values()))
    return shown


def _configuration(arguments: argparse.Namespace) -> TrainConfig:
    if arguments.model and arguments.config:
        raise ConfigError("give a CONFIG.yaml or --model, not both")
    if arguments.model:
        return config_of_model(arguments.model, arguments.set)
    return load_config(arguments.config, arguments.set)


def _quoted() -> Table:
    shown = Table("often quoted", "", "what the arithmetic gives")
    for each in quoted_figures():
        shown.add_row(each.claim, "[green]right[/]" if each.right else "[red]wrong[/]", each.found)
    return shown


def in_words(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e10 else f"{count / 1e6:,.0f} MB"
