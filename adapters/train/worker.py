"""`python -m adapters.train.worker DIRECTORY`: one training run for a server, in a process of its own, out of its way.

`run.yaml` there is the configuration. How far it is, it tells in JSON lines on standard output; everything else that is
printed goes to standard error. It stands behind everything else on the machine, is the first to go when memory is
short, and goes at once when standard input ends: with whoever began it. It knows no server.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import resource
import select
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.errors import AdapterError
from adapters.train.config import TrainConfig, load_config
from adapters.train.quiet import quiet_libraries

if TYPE_CHECKING:
    from adapters.train.journal import Step

CONFIG, LOCK = "run.yaml", "lock"
NICENESS = 15
OOM_SCORE = 800
"""Of -1000 to 1000: with much of it a process is the first to be killed when the machine's memory is short."""
MEMORY_WORDS = ("can't allocate memory", "out of memory", "cannot allocate memory", "failed to map segment")
LOOK_S = 1.0
"""Between two looks at whether the parent is still the same."""
Tell = Callable[[dict[str, Any]], None]


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m adapters.train.worker")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--memory-bytes", type=int, help="what the process may take; more fails the run")
    arguments = parser.parse_args(argv)
    ended = threading.Event()
    with _own_output() as tell:
        threading.Thread(target=_end_with, args=(os.getppid(), ended), daemon=True).start()
        _stand_back(arguments.memory_bytes)
        os.chdir(arguments.directory)  # so that messages about data name the files as the client called them
        with Path(LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # a predecessor whose server was killed may need a moment to notice
            try:
                run(load_config(Path(CONFIG)), tell)
            except AdapterError as error:
                tell({"error": {"code": error.code, "message": error.message}})
            except Exception as error:
                if not _is_about_memory(error):
                    raise
                tell({"error": {"code": "out_of_memory", "message": _memory_message(arguments.memory_bytes)}})
        ended.set()
    return 0


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


@contextlib.contextmanager
def _own_output() -> Iterator[Tell]:
    """A library that prints must not be taken for us."""
    sys.stdout.flush()
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)

        def tell(message: dict[str, Any]) -> None:
            out.write(json.dumps(message) + "\n")
            out.flush()

        yield tell


def _end_with(parent: int, ended: threading.Event) -> None:
    """With the parent: when it closes our input, or, should another of its children hold that open, is gone.

    Once everything has been told the parent may close what it likes: the interpreter takes a second to go, and that is
    no abortion.
    """
    while os.getppid() == parent:
        readable, _, _ = select.select([0], [], [], LOOK_S)
        if readable and not os.read(0, 4096):
            break
    if not ended.is_set():
        os._exit(1)


def _stand_back(memory_bytes: int | None) -> None:
    os.nice(NICENESS)
    with contextlib.suppress(OSError):  # not on Linux, or not in this container
        Path("/proc/self/oom_score_adj").write_text(str(OOM_SCORE))
    if memory_bytes is not None:
        _, most = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, most))


def _is_about_memory(error: Exception) -> bool:
    text = str(error).lower()
    # SystemError: of an extension that did not expect that it gets none
    return isinstance(error, MemoryError | SystemError) or any(words in text for words in MEMORY_WORDS)


def _memory_message(limit: int | None) -> str:
    allowed = "what the machine has" if limit is None else f"{limit} bytes (fine_tuning_memory_bytes)"
    return (
        f"training needs more memory than {allowed}; use a smaller batch_size, max_length or rank, or raise the limit"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
