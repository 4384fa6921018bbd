"""FLOW pull: list → download → check every sum → put in place, whole or not at all. From a server or from a store."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from adapters.errors import Conflict, StoreError, UploadError
from adapters.staging import staged
from adapters.store import digest_of, hash_files
from adapters.upload import safe_parts

Progress = Callable[[str, int, int], None]
"""Called with a file's name, its size, and how many bytes of it have just come."""


class Source(Protocol):
    def version(self, name: str, ref: str) -> dict[str, Any]: ...

    def files(self, name: str, ref: str) -> list[dict[str, Any]]:
        """`name`, `size_bytes` and `sha256` of each."""

    def read(self, name: str, ref: str, file: str) -> AbstractContextManager[Iterator[bytes]]: ...


def pull(
    source: Source, name: str, ref: str, directory: Path, progress: Progress = lambda file, size, count: None
) -> tuple[dict[str, Any], bool]:
    """The version, and whether it is new here: a directory that holds these very files stays as it is.

    Conflict where it holds anything else; StoreError where what came is not what was registered.
    """
    version = source.version(name, ref)
    number = str(version["version"])  # an alias may move while files come
    files = {_plain(each["name"]): each for each in source.files(name, number)}
    if _holds(directory, files):
        return version, False
    with staged(directory.absolute()) as staging:
        for file, facts in files.items():
            with source.read(name, number, file) as pieces:
                _write(staging / file, pieces, facts, progress)
        if digest_of({file: facts["sha256"] for file, facts in files.items()}) != version["digest"]:
            raise StoreError(f"the files of {name}@{number} are not those of {version['digest']}; nothing was written")
    return version, True


def _plain(name: str) -> str:
    if len(safe_parts(name)) != 1:
        raise UploadError(f"the file name {name[:200]!r} is a path; expected a plain name")
    return name


def _holds(directory: Path, files: dict[str, dict[str, Any]]) -> bool:
    """Whether all of it is there already, and nothing else. Conflict where it is anything else than empty."""
    if not directory.exists() and not directory.is_symlink():
        return False
    if not directory.is_dir():
        raise Conflict(f"{directory} is no directory; name one that is empty or not there yet", code="not_empty")
    there = sorted(directory.iterdir())
    if not there:
        return False
    if [path.name for path in there] == sorted(files) and all(path.is_file() for path in there):
        sums = hash_files(directory)
        if all(sums[file] == facts["sha256"] for file, facts in files.items()):
            return True
    raise Conflict(f"{directory} is not empty and holds something else; name another directory", code="not_empty")


def _write(path: Path, pieces: Iterator[bytes], facts: dict[str, Any], progress: Progress) -> None:
    running = hashlib.sha256()
    with path.open("wb") as file:
        for piece in pieces:
            file.write(piece)
            running.update(piece)
            progress(path.name, facts["size_bytes"], len(piece))
    if running.hexdigest() != facts["sha256"]:
        raise StoreError(
            f"{path.name} came with SHA-256 {running.hexdigest()}, expected {facts['sha256']}; nothing was written: "
            "try again, and let `loraplex adapters verify` look at the store"
        )
