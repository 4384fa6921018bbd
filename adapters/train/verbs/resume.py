"""train resume: go on with a run that was stopped or killed, from its last whole checkpoint."""

from __future__ import annotations

import argparse

from rich.console import Console

from adapters.errors import ConfigError
from adapters.train.config import TrainConfig, load_config
from adapters.train.run_directory import stored_config
from adapters.train.verbs import run

HELP = "go on with a run that was stopped or killed"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    run.add_arguments(parser)


def execute(arguments: argparse.Namespace, console: Console) -> None:
    run.train_and_hand_over(_configuration(arguments), arguments, console)


def _configuration(arguments: argparse.Namespace) -> TrainConfig:
    """Of a YAML file, or of the unfinished run itself where a directory is given."""
    overrides = [*arguments.set, *([f"output.name={arguments.name}"] if arguments.name else [])]
    if arguments.config.is_file():
        config = load_config(arguments.config, [*overrides, "output.resume=auto"])
        stored_config(config.output.output_dir)  # refuses where there is nothing to go on with
        return config
    if overrides:
        raise ConfigError("a run that is named by its directory goes on as it was; leave out --set and --name")
    return stored_config(arguments.config)
