"""The base of a load test, from its command line."""

from __future__ import annotations

import argparse
from pathlib import Path

from adapters.base import BaseModel
from server.base import find_base
from server.settings import Settings


def add_base(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="demo", help="base model directory (default: the demo base)")
    parser.add_argument("--data-dir", type=Path, default=Path(".loraplex"), help="where the demo base is kept")


def chosen_base(arguments: argparse.Namespace) -> BaseModel:
    return find_base(Settings(model=arguments.model, data_dir=arguments.data_dir))
