"""What stores on a disk share: a name that is on the disk when the call returns, and errors in our words."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adapters.errors import StoreError


def flush(path: Path) -> None:
    """A file's bytes, or the names in a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def as_store_error(action: str) -> Iterator[None]:
    """`action`: what could not be done, as `keep a file`."""
    try:
        yield
    except OSError as error:
        raise StoreError(f"could not {action}: {error}; check the disk's space and permissions") from error
