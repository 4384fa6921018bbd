"""Runs one action on copies of a store and is killed at every step of it, each time a step later.

    python -m tests.adapters.crash_child TEMPLATE BASE WORK disk|bucket upload|forget|collect

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
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from typing import Any

from sqlalchemy.engine.default import DefaultDialect

from adapters.archive import UploadLimits
from adapters.base import BaseModel
from adapters.collect import collect
from adapters.ingest import Ingest
from adapters.local_store import LocalStore
from adapters.object_store import ObjectStore
from adapters.registry import Registry
from adapters.store import Store
from tests.adapters.factories import AdapterFiles, lora_tensors

STEPS = ("mkdir", "rename", "replace", "fsync", "chmod", "unlink", "rmdir")
RANDOM_INSTANTS = 40


@dataclass(frozen=True)
class Opened:
    store: Store
    registry: Registry
    ingest: Ingest


def open_at(root: Path, base: BaseModel, kind: str) -> Opened:
    """`kind`: on a disk, or in what is treated like a bucket."""
    bucket = ObjectStore(f"file://{root}/bucket", root / "store", grace_s=0) if kind == "bucket" else None
    store, registry = bucket or LocalStore(root / "store"), Registry(f"sqlite:///{root}/registry.db")
    return Opened(store, registry, Ingest(store, registry, base, UploadLimits(), max_rank=16))


def upload(opened: Opened, name: str = "new", seed: int = 9) -> None:
    opened.ingest.upload(name, AdapterFiles(tensors=lora_tensors(seed=seed)).uploads())


def forget(opened: Opened) -> None:
    opened.ingest.forget("old", 1, with_aliases=True)


def collect_garbage(opened: Opened) -> None:
    collect(opened.store, opened.registry, 1)


ACTIONS = {"upload": upload, "forget": forget, "collect": collect_garbage}


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


def run_once(
    root: Path, open_it: Callable[[Path], Opened], action: Callable[[Opened], None], prepare: Callable[[], None]
) -> int:
    """Returns the child's process id."""
    child = os.fork()
    if child == 0:
        opened = open_it(root)
        prepare()
        action(opened)
        os._exit(0)
    return child


def main(template: Path, base_path: Path, work: Path, kind: str, action: Callable[[Opened], None]) -> None:
    base = BaseModel.read(base_path)

    def open_it(root: Path) -> Opened:
        return open_at(root, base, kind)

    number, ended = 0, False
    while not ended:
        root = shutil.copytree(template, work / str(number))
        child = run_once(root, open_it, action, partial(kill_at, number))
        ended = os.waitpid(child, 0)[1] == 0
        number += 1
    chance = random.Random(0)
    for instant in range(number, number + RANDOM_INSTANTS):
        root = shutil.copytree(template, work / str(instant))
        child = run_once(root, open_it, action, lambda: None)
        time.sleep(chance.uniform(0, 0.04))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4], ACTIONS[sys.argv[5]])
