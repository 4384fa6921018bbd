"""A merge on its way: a directory beside its place, held by one process at a time, that a later try takes up again."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from adapters.checksums import sha256_of
from adapters.disk import flush
from adapters.errors import AdapterError, Conflict
from adapters.staging import settle

STATE = "unfinished.json"


class Work:
    """What is there of it."""

    def __init__(self, path: Path, plan: str) -> None:
        self.path = path
        self._plan = plan
        found = _read(path / STATE)
        shards = found.get("shards", {}) if found.get("plan") == plan else {}
        self.shards = {name: hexed for name, hexed in shards.items() if _is(path / name, hexed)}
        """Finished ones: name → `sha256` hex."""
        _clear(path, {*self.shards, STATE} if self.shards else set())

    def done(self, shard: str, hexed: str) -> None:
        """It is on the disk already: a crash before this line costs the shard, one after it does not."""
        self.shards[shard] = hexed
        part = self.path / f"{STATE}.part"
        with part.open("w", encoding="utf-8") as file:
            json.dump({"plan": self._plan, "shards": self.shards}, file)
            file.flush()
            os.fsync(file.fileno())
        part.rename(self.path / STATE)


@contextmanager
def unfinished(destination: Path, plan: str) -> Iterator[Work]:
    """The directory becomes `destination` when the block ends well. It stays for another try when the machine fails or
    somebody stops it, and goes when another try would fail the same way.

    `plan`: a digest; what another plan left is cleared away. Conflict where another process is at it.
    """
    path = destination.with_name(f".{destination.name}.merging")
    path.mkdir(parents=True, exist_ok=True)
    with _held(path):
        work = Work(path, plan)
        try:
            yield work
        except AdapterError:
            shutil.rmtree(path)
            raise
        settle(path)  # takes as long as the disk does; what is done stays known meanwhile
        (path / STATE).unlink(missing_ok=True)
        if destination.is_dir():
            destination.rmdir()  # an empty one; anything else was refused before
        path.rename(destination)
        flush(destination.parent)


@contextmanager
def _held(path: Path) -> Iterator[None]:
    held = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Conflict(f"another process merges into {path} now; wait for it", code="merge_runs") from None
        yield
    finally:
        os.close(held)


def _read(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _clear(path: Path, kept: Collection[str]) -> None:
    for each in path.iterdir():
        if each.is_dir():
            shutil.rmtree(each)
        elif each.name not in kept:
            each.unlink()


def _is(path: Path, hexed: str) -> bool:
    return path.is_file() and sha256_of(path) == hexed
