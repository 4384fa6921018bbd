"""train run: one training run from its configuration, checked as the server would, handed over if asked."""

from __future__ import annotations

import argparse
import os
import time
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from adapters.train.allocator import use_huge_pages
from adapters.train.config import TrainConfig
from adapters.train.forecast import forecast, require_fit
from adapters.train.handover import check_servable, upload
from adapters.train.memory import measured
from adapters.train.quiet import quiet_libraries
from adapters.train.trackers import require_installed
from adapters.train.verbs import check, configuration
from adapters.train.verbs.estimate import add_memory, in_words, limit_of, show

if TYPE_CHECKING:
    from adapters.train.recipe import Trained

HELP = "train from a YAML file and, if asked, hand the adapter over"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    configuration.add_arguments(parser)
    parser.add_argument("--server", metavar="URL", help="upload the result to this server")
    parser.add_argument("--api-key", help="bearer key for --server; default: LORAPLEX_API_KEY")
    parser.add_argument("--dry-run", action="store_true", help="check, estimate and the first sample; trains nothing")
    add_memory(parser)


def execute(arguments: argparse.Namespace, console: Console) -> None:
    if arguments.dry_run:
        dry_run(configuration.configuration(arguments), arguments, Console())
        return
    train_and_hand_over(configuration.configuration(arguments), arguments, console)


def dry_run(config: TrainConfig, arguments: argparse.Namespace, console: Console) -> None:
    """All that a run refuses before it loads a weight, in the same words and with the same exit codes."""
    require_installed(config.output.report_to)
    expected = forecast(config, check.show(config, 1, console))
    show(expected, limit_of(arguments), console)
    require_fit(expected, limit_of(arguments), ignore=arguments.ignore_memory)


def train_and_hand_over(config: TrainConfig, arguments: argparse.Namespace, console: Console) -> None:
    require_installed(config.output.report_to)
    if config.peft.foreseen:
        console.print(f"[yellow]not servable:[/] {config.peft.foreseen}", soft_wrap=True)
    use_huge_pages()
    with quiet_libraries(), console.status("loading torch, transformers and peft"):
        from adapters.train.recipe import read_material, train
    begun = time.monotonic()
    with quiet_libraries(), measured() as memory:
        material = read_material(config)
        expected = forecast(config, material.data.longest_row)
        require_fit(expected, limit_of(arguments), ignore=arguments.ignore_memory)
        trained = train(config, material=material)
    _show(trained, time.monotonic() - begun, console)
    console.print(f"peak memory {in_words(memory.peak)} measured, {in_words(expected.total)} estimated")
    output = config.output
    manifest = check_servable(
        trained.directory, config.model.model_name_or_path, output.max_lora_rank, output.max_error
    )
    console.print(f"servable: {manifest.verdict}", soft_wrap=True)
    if arguments.server:
        key = arguments.api_key or os.environ.get("LORAPLEX_API_KEY")
        version = upload(trained.directory, trained.name, output.description, arguments.server, key, output.max_error)
        console.print(f"served as [bold]{version['name']}@{version['version']}[/] by {arguments.server}")


def _show(trained: Trained, seconds: float, console: Console) -> None:
    verdict = trained.verdict
    console.print(
        f"held-out loss {verdict.held_out_base:.3f} (base) → [bold]{verdict.held_out_adapter:.3f}[/] (adapter), "
        f"{len(trained.steps)} steps, {seconds:.0f} s"
    )
    if verdict.forgotten is not None:
        console.print(
            f"general loss {verdict.general_base:.3f} (base) → [bold]{verdict.general_adapter:.3f}[/] (adapter): "
            f"{verdict.forgotten:+.3f} forgotten"
        )
    for prompt, before, after in zip(verdict.prompts, verdict.before, verdict.after, strict=True):
        console.print(f"[bold]{escape(prompt)}[/]\n  base     {escape(before)}\n  adapter  {escape(after)}")
    for note in trained.notes:
        console.print(f"[yellow]{escape(note)}[/]", soft_wrap=True)
    if trained.truncated:
        console.print(f"[yellow]{trained.truncated} conversations were cut at data.max_length[/]")
    if trained.duplicates:
        console.print(f"[yellow]{trained.duplicates} duplicate conversations were left out[/]")
    if trained.skipped:
        console.print(f"[yellow]{trained.skipped} wrong rows were left out; `train check` names them[/]")
    console.print(f"saved in {escape(str(trained.directory))}", soft_wrap=True)
