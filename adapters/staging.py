"""A directory that appears whole or not at all: written beside its place, flushed to disk, renamed once.

It knows nothing of what is written.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def staged(destination: Path) -> Iterator[Path]:
    """Yield an empty directory; when the block ends well it becomes `destination`, otherwise it vanishes.

    An existing `destination` is replaced, also when another process put it there in the meantime.
    """
    destination.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.parent))
    try:
        yield staging
        settle(staging)
        _swap(staging, destination)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def settle(directory: Path) -> None:
    """Flush every file and open it to other users: mkdtemp makes 0700 and safetensors 0600, against the umask."""
    directory.chmod(0o755)
    for path in directory.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _swap(staging: Path, destination: Path) -> None:
    """A full directory cannot be renamed over, so the old one steps aside into the staging directory's sibling."""
    old = staging.with_name(staging.name + ".old")
    if destination.exists():
        destination.rename(old)
    try:
        staging.rename(destination)
    except OSError:
        if old.exists():
            old.rename(destination)
        raise
    shutil.rmtree(old, ignore_errors=True)
