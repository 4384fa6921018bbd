"""`python -m adapters.train.worker DIRECTORY`: one training run for a server, in a process of its own, out of its way.

`run.yaml` there is the configuration. How it speaks and how it ends: adapters/background.py. It knows no server.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from adapters.background import Duty, Tell, serve
from adapters.train.config import TrainConfig, load_config
from adapters.train.quiet import quiet_libraries

if TYPE_CHECKING:
    from adapters.train.journal import Step

CONFIG = "run.yaml"


def main(argv: Sequence[str]) -> int:
    duty = Duty(
        module="adapters.train.worker",
        work=lambda tell: run(load_config(Path(CONFIG)), tell),
        doing="training",
        setting="fine_tuning_memory_bytes",
        advice="use a smaller batch_size, max_length or rank, or raise the limit",
    )
    return serve(duty, argv)


def run(config: TrainConfig, tell: Tell) -> None:
    """Nothing to do where a predecessor had come to its end already."""
    if config.output.output_dir.exists():
        return
    tell({"stage": "validating"})
    with quiet_libraries():
        tell({"stage": "training", **check_data(config)})
        learn(config, tell)


def check_data(config: TrainConfig) -> dict[str, int]:
    """Everything that can be wrong with it is found here, before the base is loaded. Raises DataError."""
    from adapters.train.recipe import read_material

    data = read_material(config).data
    return {"train_rows": len(data.examples), "held_out_rows": len(data.held_out)}


def learn(config: TrainConfig, tell: Tell) -> None:
    from adapters.train.recipe import train

    def watch(step: Step, total: int) -> None:
        tell({"step": asdict(step), "total_steps": total})

    train(config, watch=watch)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
