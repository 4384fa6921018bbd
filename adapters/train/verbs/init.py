"""train init: write a configuration to begin with, every key with what it means, for a method and a data file."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from adapters.errors import ConfigError
from adapters.train.config import load_config
from adapters.train.template import template

HELP = "write a commented configuration to begin with"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml", help="the file to write")
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="the base, a Hugging Face directory")
    parser.add_argument("--data", type=Path, required=True, nargs="+", metavar="FILE", help="what to train on")
    parser.add_argument("--method", default="lora", help="peft.method (default: lora)")
    parser.add_argument("--name", help="of the adapter; default: as the configuration's file is called")
    parser.add_argument("--force", action="store_true", help="write over a file that is there")


def execute(arguments: argparse.Namespace, console: Console) -> None:
    path: Path = arguments.config
    text = template(_values(arguments))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w" if arguments.force else "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ConfigError(f"{path} is there already; --force writes over it") from None
    try:
        load_config(path)
    except ConfigError:
        path.unlink()
        raise
    console.print(f"written: {escape(str(path))}; next: loraplex train check {escape(str(path))}", soft_wrap=True)


def _values(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Data are named from where the file stands, so that the two can be moved together."""
    folder = arguments.config.resolve().parent
    name = arguments.name or arguments.config.stem
    return {
        "model": {"model_name_or_path": str(arguments.model)},
        "peft": {"method": arguments.method},
        "data": {"train": [os.path.relpath(file.resolve(), folder) for file in arguments.data]},
        "training": {"num_train_epochs": 3},
        "output": {"output_dir": f"adapters/{name}", "name": name},
    }
