"""A process that works for a server: out of everybody's way, heard through JSON lines, gone with whoever began it.

What it says goes to standard output; everything else that is printed goes to standard error. It works in a directory
of its own, one process at a time, stands behind everything else on the machine and is the first to go when memory is
short. It ends at once when standard input does. It knows no server, and not what the work is.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters.errors import AdapterError

LOCK = "lock"
NICENESS = 15
OOM_SCORE = 800
"""Of -1000 to 1000: with much of it a process is the first to be killed when the machine's memory is short."""
MEMORY_WORDS = ("can't allocate memory", "out of memory", "cannot allocate memory", "failed to map segment")
LOOK_S = 1.0
"""Between two looks at whether the parent is still the same."""
Tell = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Duty:
    module: str
    work: Callable[[Tell], None]
    """Called in the directory. An AdapterError that it raises is told."""
    doing: str
    """In one word, for a person."""
    setting: str
    """Of the server: what the process may take."""
    advice: str
    """How it could do with less memory."""


def serve(duty: Duty, argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog=f"python -m {duty.module}")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--memory-bytes", type=int, help="what the process may take; more fails the work")
    arguments = parser.parse_args(argv)
    ended = threading.Event()
    with _own_output() as tell:
        threading.Thread(target=_end_with, args=(os.getppid(), ended), daemon=True).start()
        _stand_back(arguments.memory_bytes)
        os.chdir(arguments.directory)  # so that messages about files name them as the client called them
        with Path(LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # a predecessor whose server was killed may need a moment to notice
            try:
                duty.work(tell)
            except AdapterError as error:
                tell({"error": {"code": error.code, "message": error.message, "class": type(error).__name__}})
            except Exception as error:
                if not _is_about_memory(error):
                    raise
                message = _memory_message(duty, arguments.memory_bytes)
                tell({"error": {"code": "out_of_memory", "message": message}})
        ended.set()
    return 0


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


def _memory_message(duty: Duty, limit: int | None) -> str:
    allowed = "what the machine has" if limit is None else f"{limit} bytes ({duty.setting})"
    return f"{duty.doing} needs more memory than {allowed}; {duty.advice}"
