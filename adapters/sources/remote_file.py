"""What every kind of source gives: a list of files to read, and where they come from. Opens nothing itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

from adapters.archive import ARCHIVES, is_archive
from adapters.errors import SourceError

SILENCE_S = 30.0
"""How long a source may send nothing."""


class Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


class Chunks:
    """An iterator of bytes, read like a file."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks

    def read(self, _: int, /) -> bytes:
        """The next chunk, whatever its size: whoever copies takes what comes."""
        return next((chunk for chunk in self._chunks if chunk), b"")


@dataclass(frozen=True)
class RemoteFile:
    name: str
    """One of the names that are kept, or an archive's."""
    size: int | None
    open: Callable[[], AbstractContextManager[Readable]]
    sha256: str | None = None
    """Where the source knows it."""


@dataclass(frozen=True)
class Listing:
    files: tuple[RemoteFile, ...]
    lineage: Mapping[str, Any] = field(default_factory=dict)
    """What a version should remember of where it came from."""

    @property
    def total_bytes(self) -> int | None:
        sizes = [file.size for file in self.files]
        return None if None in sizes else sum(size for size in sizes if size is not None)


def require_archive(name: str) -> str:
    """Of a source that is one file."""
    if not is_archive(name):
        raise SourceError(
            f"{name[:200]!r} is a single file and no archive; expected {', '.join(ARCHIVES)}, or the directory that "
            "holds the adapter's files"
        )
    return name
