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
from adapters.errors import WouldNotFit
from adapters.train.allocator import use_huge_pages
from adapters.train.config import TrainConfig, load_config
from adapters.train.forecast import forecast
from adapters.train.memory import limit_bytes
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
    """Nothing to do where a predecessor had come to its end already. All that can be wrong with the data is found, and
    what would not fit is refused, before the base is loaded. Raises DataError and WouldNotFit."""
    if config.output.output_dir.exists():
        return
    tell({"stage": "validating"})
    use_huge_pages()
    with quiet_libraries():
        from adapters.train.recipe import read_material, train

        material = read_material(config)
        require_room(config, material.data.longest_row)
        rows = {"train_rows": len(material.data.examples), "held_out_rows": len(material.data.held_out)}
        tell({"stage": "training", **rows})

        def watch(step: Step, total: int) -> None:
            tell({"step": asdict(step), "total_steps": total})

        train(config, watch=watch, material=material)


def require_room(config: TrainConfig, longest_row: int) -> None:
    found, limit = forecast(config, longest_row), limit_bytes()
    if found.needed > limit:
        raise WouldNotFit(
            f"training would take about {found.needed / 1e6:,.0f} MB, and may take {limit / 1e6:,.0f} MB "
            f"(fine_tuning_memory_bytes, or what the machine has); batches are {found.load.batch} rows of up to "
            f"{found.load.tokens} tokens: use a smaller batch_size or max_length, or gradient_checkpointing"
        )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
