"""A merge on its way: a directory beside its place, held by one process at a time, that a later try takes up again.

One that was refused for what it loses waits there as well, with its report, for somebody who accepts that. What nobody
took up for a week goes when the next merge beside it begins.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from adapters.checksums import sha256_of
from adapters.disk import flush
from adapters.errors import AdapterError, Conflict, Unfaithful
from adapters.staging import settle

STATE = "unfinished.json"
KEPT_DAYS = 7


class Work:
    """What is there of it."""

    def __init__(self, path: Path, plan: str, documents: Collection[str] = ()) -> None:
        self.path = path
        self._plan = plan
        found = _read(path / STATE)
        shards = found.get("shards", {}) if found.get("plan") == plan else {}
        self.shards = {name: hexed for name, hexed in shards.items() if _is(path / name, hexed)}
        """Finished ones: name → `sha256` hex."""
        _clear(path, {*self.shards, *documents, STATE} if self.shards else set())

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
def unfinished(destination: Path, plan: str, documents: Collection[str] = ()) -> Iterator[Work]:
    """The directory becomes `destination` when the block ends well. It stays for another try when the machine fails,
    somebody stops it, or it is Unfaithful, which may be accepted; and goes when another try would fail the same way.

    `plan`: a digest; what another plan left is cleared away. `documents`: names of what the block writes beside shards,
    and may find there from another try. Conflict where another process is at it.
    """
    path = place_of(destination)
    path.mkdir(parents=True, exist_ok=True)
    _remove_old(path.parent, path)
    with _held(path):
        work = Work(path, plan, documents)
        try:
            yield work
        except Unfaithful:
            raise
        except AdapterError:
            shutil.rmtree(path)
            raise
        settle(path)  # takes as long as the disk does; what is done stays known meanwhile
        (path / STATE).unlink(missing_ok=True)
        if destination.is_dir():
            destination.rmdir()  # an empty one; anything else was refused before
        path.rename(destination)
        flush(destination.parent)


def place_of(destination: Path) -> Path:
    """Where a merge is until it is done; no name that anybody loads a model by."""
    return destination.with_name(f".{destination.name}.merging")


def _remove_old(folder: Path, mine: Path) -> None:
    oldest = time.time() - KEPT_DAYS * 24 * 3600
    for path in folder.glob(place_of(folder / "*").name):
        with suppress(Conflict, OSError):  # somebody is at it, or was, or it is not ours
            if path != mine and (path / STATE).stat().st_mtime < oldest:
                with _held(path):
                    shutil.rmtree(path)


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
