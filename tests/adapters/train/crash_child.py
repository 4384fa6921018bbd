"""One small training run, killed at random moments, each time from the start, then gone on with.

    python -m tests.adapters.train.crash_child CONFIG.yaml TIMES SEED

Forks from one process that has torch loaded but has computed nothing. A moment is a numbered instant, the same in
every run of this program, or some milliseconds after one: then the kill comes from outside and may cut a write in two,
which no instant stands for. Prints a line for each kill: where it happened, what was left, and the SHA-256 of the
weights that the run ended with; the first line is that of a run that nobody killed.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import matplotlib.figure  # noqa: F401  loaded once, before the forks
from transformers import LlamaForCausalLM  # noqa: F401

from adapters.train.config import load_config
from adapters.train.journal import Journal
from adapters.train.quiet import quiet_libraries
from adapters.train.recipe import train
from adapters.train.run_directory import RunDirectory
from tests.adapters.instants import Instants

LATER_S = (0.0, 0.0, 0.001, 0.003, 0.01, 0.03)


@dataclass(frozen=True)
class Moment:
    instant: int
    later_s: float


def run(path: Path, moment: Moment | None = None) -> str:
    """In a process of its own, which tells what it does when that moment comes; how many instants it has, if none."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        work(path, moment, writing)
    os.close(writing)
    with os.fdopen(reading) as told:
        first = told.readline() if moment else ""
        if first and moment:
            time.sleep(moment.later_s)
            os.kill(child, signal.SIGKILL)
        rest = told.read().splitlines()
    os.waitpid(child, 0)
    return [first.strip(), *rest][-1]


def work(path: Path, moment: Moment | None, told: int) -> None:
    """Goes on to the end, telling every instant from the fatal one on; with nothing to wait for, it stops at once."""
    where = "run"

    def reached(number: int, what: str) -> None:
        if moment and number >= moment.instant:
            os.write(told, f"{where}: {what}\n".encode())
            if not moment.later_s:
                signal.pause()

    def saving(save: Callable[..., None]) -> Callable[..., None]:
        @wraps(save)
        def wrapper(*arguments: Any) -> None:
            nonlocal where
            where = "checkpoint"
            save(*arguments)
            where = "run"

        return wrapper

    config = load_config(path)
    instants = Instants(path.parent, reached)
    instants.install()
    Journal._write = instants._around("line", Journal._write)  # type: ignore[method-assign]
    RunDirectory.save = saving(RunDirectory.save)  # type: ignore[method-assign]
    with quiet_libraries(), open(os.devnull, "w") as nothing:
        sys.stderr = nothing
        train(config)
    if not moment:
        os.write(told, str(instants.count).encode())
    os._exit(0)


def weights(path: Path) -> str:
    file = path.parent / "out" / "adapter_model.safetensors"
    return hashlib.sha256(file.read_bytes()).hexdigest()


def main(path: Path, times: int, seed: int) -> None:
    count = int(run(path))
    print("whole", weights(path), flush=True)
    chance = random.Random(seed)
    for instant in sorted(chance.sample(range(1, count + 1), times)):
        moment = Moment(instant, chance.choice(LATER_S))
        shutil.rmtree(path.parent / "out")
        what = run(path, moment)
        run(path)
        left = sorted(entry.name for entry in path.parent.iterdir() if entry.name not in (path.name, "rows.jsonl"))
        at = f"{instant}/{count} + {1000 * moment.later_s:.0f} ms"
        print(f"{at}, {what}: left {left}", weights(path), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
