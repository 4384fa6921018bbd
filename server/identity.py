"""Which of the servers on a shared registry this is: a few digits that lie in its data directory.

Servers that share a data directory have one each: `server-id`, `server-id.2` and so on. A server holds its own while it
is up, and the next start takes the first that is free, so that a restart finds what was the server's own.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import re
import secrets
import weakref
from collections.abc import Iterator
from pathlib import Path

FILE = "server-id"
DIGITS = 12


class Identity:
    """Held from its making on, until it is given back, or its process ends, however it does."""

    def __init__(self, data_dir: Path) -> None:
        descriptor = next(found for found in map(_held, _files(data_dir)) if found is not None)
        self.release = weakref.finalize(self, os.close, descriptor)
        self.id = _read_or_make(descriptor)


def _files(data_dir: Path) -> Iterator[Path]:
    return (data_dir / (FILE if number == 1 else f"{FILE}.{number}") for number in itertools.count(1))


def _held(path: Path) -> int | None:
    """Open and locked; None where another server has it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def _read_or_make(descriptor: int) -> str:
    """Made at the first start, and where it is damaged."""
    known = os.pread(descriptor, 2 * DIGITS, 0).decode("ascii", errors="replace").strip()
    if re.fullmatch(f"[0-9a-f]{{{DIGITS}}}", known):
        return known
    made = secrets.token_hex(DIGITS // 2)
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, made.encode(), 0)
    os.fsync(descriptor)
    return made
