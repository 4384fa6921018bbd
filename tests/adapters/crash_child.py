"""Runs one action on copies of a store and is killed at every step of it, each time a step later.

    python -m tests.adapters.crash_child TEMPLATE BASE WORK upload|forget

Forks from one warm process. WORK/<n> is what the n-th kill left behind; the last one ran to its end.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Any

from sqlalchemy.engine.default import DefaultDialect

from adapters.archive import UploadLimits
from adapters.base import BaseModel
from adapters.ingest import Ingest
from adapters.local_store import LocalStore
from adapters.registry import Registry
from tests.adapters.factories import AdapterFiles, lora_tensors

STEPS = ("mkdir", "rename", "replace", "fsync", "chmod", "unlink", "rmdir")
RANDOM_INSTANTS = 40


def open_ingest(root: Path, base: BaseModel) -> tuple[LocalStore, Registry, Ingest]:
    store, registry = LocalStore(root / "store"), Registry(f"sqlite:///{root}/registry.db")
    return store, registry, Ingest(store, registry, base, UploadLimits(), max_rank=16)


def upload(ingest: Ingest) -> None:
    ingest.upload("new", AdapterFiles(tensors=lora_tensors(seed=2)).uploads())


def forget(ingest: Ingest) -> None:
    ingest.forget("old", 1, with_aliases=True)


def kill_at(number: int) -> None:
    """SIGKILL before and after each of the calls that change the disk, at the `number`-th such place."""
    left = number

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            reach()
            result = call(*args, **kwargs)
            reach()
            return result

        return wrapper

    def reach() -> None:
        nonlocal left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    for step in STEPS:
        setattr(os, step, counted(getattr(os, step)))
    DefaultDialect.do_commit = counted(DefaultDialect.do_commit)  # type: ignore[method-assign]


def run_once(root: Path, base: BaseModel, action: Callable[[Ingest], None], prepare: Callable[[], None]) -> int:
    """Returns the child's process id."""
    child = os.fork()
    if child == 0:
        _, _, ingest = open_ingest(root, base)
        prepare()
        action(ingest)
        os._exit(0)
    return child


def main(template: Path, base_path: Path, work: Path, action: Callable[[Ingest], None]) -> None:
    base = BaseModel.read(base_path)
    number, ended = 0, False
    while not ended:
        root = shutil.copytree(template, work / str(number))
        child = run_once(root, base, action, partial(kill_at, number))
        ended = os.waitpid(child, 0)[1] == 0
        number += 1
    chance = random.Random(0)
    for instant in range(number, number + RANDOM_INSTANTS):
        root = shutil.copytree(template, work / str(instant))
        child = run_once(root, base, action, lambda: None)
        time.sleep(chance.uniform(0, 0.04))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), {"upload": upload, "forget": forget}[sys.argv[4]])
