"""One small training run, killed at random instants that are the same in every run of this program, then gone on with.

    python -m tests.adapters.train.crash_child CONFIG.yaml TIMES

Forks from one process that has torch loaded but has computed nothing. Prints a line for each kill: what happened then
and the SHA-256 of the weights that the run ended with; the first line is that of a run that nobody killed.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import sys
from pathlib import Path

import matplotlib.figure  # noqa: F401  loaded once, before the forks
from transformers import LlamaForCausalLM  # noqa: F401

from adapters.train.config import load_config
from adapters.train.journal import Journal
from adapters.train.quiet import quiet_libraries
from adapters.train.recipe import train
from tests.adapters.instants import Instants


def run(path: Path, kill_at: int = 0, told: int = 1) -> None:
    """In a process of its own; `kill_at` 0 lets it end. Tells how many instants there were, or the fatal one."""
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return

    def reached(number: int, what: str) -> None:
        if number == kill_at:
            os.write(told, what.encode())
            os.kill(os.getpid(), signal.SIGKILL)

    config = load_config(path)
    instants = Instants(path.parent, reached)
    instants.install()
    Journal._write = instants._around("line", Journal._write)  # type: ignore[method-assign]
    with quiet_libraries(), open(os.devnull, "w") as nothing:
        sys.stderr = nothing
        train(config)
    if not kill_at:
        os.write(told, str(instants.count).encode())
    os._exit(0)


def tell(path: Path, kill_at: int = 0) -> str:
    reading, writing = os.pipe()
    run(path, kill_at, writing)
    os.close(writing)
    with os.fdopen(reading) as told:
        return told.read()


def weights(path: Path) -> str:
    file = path.parent / "out" / "adapter_model.safetensors"
    return hashlib.sha256(file.read_bytes()).hexdigest()


def main(path: Path, times: int) -> None:
    count = int(tell(path))
    print("whole", weights(path), flush=True)
    chance = random.Random(0)
    for kill_at in sorted(chance.sample(range(1, count + 1), times)):
        shutil.rmtree(path.parent / "out")
        what = tell(path, kill_at)
        run(path)
        left = sorted(entry.name for entry in path.parent.iterdir() if entry.name not in (path.name, "rows.jsonl"))
        print(f"{kill_at}/{count} {what}: left {left}", weights(path), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
