"""FLOW download: list → what is missing of each file, also of one that broke off → check every sum → nothing else.

Files come one by one into a directory; one that is there with the right sum is not fetched again. It does not know
where they come from.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from adapters.checksums import sha256_of
from adapters.errors import RemoteUnreachable, StoreError, UploadError
from adapters.upload import safe_parts

PART = ".part"
TRIES = 5
"""In a row without a byte more; each that brought some begins the count anew."""
PAUSE_S = 0.5
Reader = Callable[[str, int], AbstractContextManager[Iterator[bytes]]]
"""The bytes of a file by its name, from an offset on."""
Progress = Callable[[str, int], None]
"""Called with a file's name and how many bytes more of it are here."""


def download(
    files: Sequence[Mapping[str, Any]], read: Reader, directory: Path, progress: Progress = lambda file, count: None
) -> None:
    """`files`: `name`, `size_bytes` and `sha256` of each. Raises StoreError for bytes that are not those."""
    directory.mkdir(parents=True, exist_ok=True)
    for facts in files:
        path = directory / _plain(facts["name"])
        if path.is_file() and path.stat().st_size == facts["size_bytes"] and sha256_of(path) == facts["sha256"]:
            progress(path.name, facts["size_bytes"])
            continue
        _one(facts, read, path, progress)


def _one(facts: Mapping[str, Any], read: Reader, path: Path, progress: Progress) -> None:
    part = path.with_name(path.name + PART)
    with part.open("ab") as out:
        if out.tell() > facts["size_bytes"]:
            out.truncate(0)
        progress(path.name, out.tell())
        _fill(facts, read, out, path.name, progress)
        out.flush()
        os.fsync(out.fileno())
    if (found := sha256_of(part)) != facts["sha256"]:
        part.unlink()
        raise StoreError(f"{path.name} came with SHA-256 {found}, expected {facts['sha256']}; it was thrown away")
    part.rename(path)


def _fill(facts: Mapping[str, Any], read: Reader, out: Any, name: str, progress: Progress) -> None:
    failures = 0
    while (have := out.tell()) < facts["size_bytes"]:
        try:
            with read(name, have) as pieces:
                for piece in pieces:
                    out.write(piece)
                    progress(name, len(piece))
        except RemoteUnreachable:
            failures = failures + 1 if out.tell() == have else 1
            if failures == TRIES:
                raise
            time.sleep(PAUSE_S)
        else:
            if out.tell() == have:
                raise StoreError(f"{name} ended after {have} of {facts['size_bytes']} bytes")


def _plain(name: str) -> str:
    if len(safe_parts(name)) != 1:
        raise UploadError(f"the file name {name[:200]!r} is a path; expected a plain name")
    return name
