"""`loraplex train run CONFIG.yaml`, also `python -m adapters.train`: the command line of one training run.

Exit codes: 0 done · 1 the run failed · 2 configuration or command line · 3 data · 6 trained, but not servable.
torch is loaded only when a configuration has been read without an error.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from adapters.errors import AdapterError, ConfigError, DataError, NotServable
from adapters.train.config import TrainConfig, load_config
from adapters.train.handover import check_servable, upload
from adapters.train.quiet import quiet_libraries

if TYPE_CHECKING:
    from adapters.train.recipe import Trained

EXIT_CODES: tuple[tuple[type[AdapterError], int], ...] = ((ConfigError, 2), (DataError, 3), (NotServable, 6))
FAILED = 1


def main(argv: Sequence[str]) -> int:
    # Beside a busy neighbour (an engine, a second run) threads that spin while they wait made a step of 2 s take
    # 40 to 90 s; threads that sleep make it 6 s, and alone 2.3 s. OpenMP reads this when torch is first imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    arguments = _parser().parse_args(argv)
    console = Console(stderr=True)
    try:
        run(arguments, console)
    except AdapterError as error:
        console.print(f"[bold red]error:[/] {escape(error.message)}", soft_wrap=True)
        return next((code for kind, code in EXIT_CODES if isinstance(error, kind)), FAILED)
    except KeyboardInterrupt:
        console.print("[bold red]stopped[/]: nothing was written")
        return 130
    return 0


def run(arguments: argparse.Namespace, console: Console) -> None:
    config = load_config(arguments.config, [*arguments.set, *_name_override(arguments.name)])
    begun = time.monotonic()
    trained = _train(config, console)
    _show(trained, time.monotonic() - begun, console)
    check_servable(trained.directory, config.model.model_name_or_path, config.output.max_lora_rank)
    if arguments.server:
        key = arguments.api_key or os.environ.get("LORAPLEX_API_KEY")
        version = upload(trained.directory, trained.name, config.output.description, arguments.server, key)
        console.print(f"served as [bold]{version['name']}@{version['version']}[/] by {arguments.server}")


def _name_override(name: str | None) -> list[str]:
    return [f"output.name={name}"] if name else []


def _train(config: TrainConfig, console: Console) -> Trained:
    with quiet_libraries():
        with console.status("loading torch, transformers and peft"):
            from adapters.train.recipe import train
        return train(config)


def _show(trained: Trained, seconds: float, console: Console) -> None:
    verdict = trained.verdict
    console.print(
        f"held-out loss {verdict.held_out_base:.3f} (base) → [bold]{verdict.held_out_adapter:.3f}[/] (adapter), "
        f"{len(trained.steps)} steps, {seconds:.0f} s"
    )
    for prompt, before, after in zip(verdict.prompts, verdict.before, verdict.after, strict=True):
        console.print(f"[bold]{escape(prompt)}[/]\n  base     {escape(before)}\n  adapter  {escape(after)}")
    if trained.truncated:
        console.print(f"[yellow]{trained.truncated} conversations were cut at data.max_length[/]")
    if trained.duplicates:
        console.print(f"[yellow]{trained.duplicates} duplicate conversations were left out[/]")
    console.print(f"saved in {escape(str(trained.directory))}", soft_wrap=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="loraplex train", description="Train a LoRA adapter on NF4.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("run", help="train from a YAML file and, if asked, hand the adapter over")
    command.add_argument("config", type=Path, metavar="CONFIG.yaml")
    command.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    command.add_argument("--name", help="short for --set output.name=NAME")
    command.add_argument("--server", metavar="URL", help="upload the result to this server")
    command.add_argument("--api-key", help="bearer key for --server; default: LORAPLEX_API_KEY")
    return parser
