"""The flags that every verb with a configuration has, and the configuration they mean."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from adapters.train.config import TrainConfig, load_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml")
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override one key; may be repeated"
    )
    parser.add_argument("--name", help="short for --set output.name=NAME")


def configuration(arguments: argparse.Namespace) -> TrainConfig:
    """Raises ConfigError with a line for each thing that is wrong."""
    named = [f"output.name={arguments.name}"] if arguments.name else []
    return load_config(arguments.config, [*arguments.set, *named], warn)


def warn(text: str) -> None:
    Console(stderr=True).print(f"[yellow]warning:[/] {escape(text)}", soft_wrap=True)
