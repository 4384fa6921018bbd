"""FLOW fetch: a source → files in a directory, never more than the limits, stopped whenever its watcher says so.

It does not know what a valid adapter is: what it wrote goes through the one door, like an upload.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adapters.errors import SourceUnavailable, StoreError, UploadTooLarge
from adapters.ingest import Ingest
from adapters.refusals import refuse
from adapters.registry import Version
from adapters.sources import hub, local, objects, web
from adapters.sources.address import Policy, Source
from adapters.sources.remote_file import Listing, Readable, RemoteFile
from adapters.sources.trouble import reporting
from adapters.upload import PLAIN, WEIGHTS, UploadedFile, UploadLimits, UploadOptions

CHUNK_BYTES = 1 << 18
LISTINGS: Mapping[str, Callable[[Source, Policy], AbstractContextManager[Listing]]] = {
    "file": local.listing,
    "hf": hub.listing,
    "https": web.listing,
    "http": web.listing,
}


@dataclass(frozen=True)
class Progress:
    bytes: int
    total_bytes: int | None
    """Where the source says how much there is."""
    file: str
    """What is being read."""


Watch = Callable[[Progress], None]
"""Called for every chunk; what it raises ends the fetch."""


@dataclass(frozen=True)
class Fetched:
    files: tuple[Path, ...]
    lineage: Mapping[str, Any]


def admit(
    source: Source,
    name: str,
    ingest: Ingest,
    policy: Policy,
    limits: UploadLimits,
    options: UploadOptions = PLAIN,
    watch: Watch = lambda _: None,
    timeout_s: float = 3600,
) -> tuple[Version, bool]:
    """Fetch, then upload. Raises SourceError and its kinds, or what an upload of the same files would raise."""
    with ingest.scratch() as directory, ExitStack() as opened:
        fetched = fetch(source, policy, directory, limits, watch, timeout_s)
        files = [UploadedFile(path.name, opened.enter_context(path.open("rb"))) for path in fetched.files]
        return ingest.upload(name, files, replace(options, source=fetched.lineage))


def fetch(
    source: Source,
    policy: Policy,
    into: Path,
    limits: UploadLimits,
    watch: Watch = lambda _: None,
    timeout_s: float = 3600,
) -> Fetched:
    """Write the source's files into `into`. `timeout_s` bounds all of it."""
    policy.require(source)
    deadline = time.monotonic() + timeout_s
    with ExitStack() as stack:
        with reporting(source):
            listing = stack.enter_context(LISTINGS.get(source.protocol, objects.listing)(source, policy))
        _require_fit(source, listing, limits)
        done = 0
        for file in listing.files:
            for size in _copy(source, file, into / file.name):
                done += size
                _require_time_and_room(source, done, limits, deadline)
                watch(Progress(done, listing.total_bytes, file.name))
    return Fetched(tuple(into / file.name for file in listing.files), listing.lineage)


def _require_fit(source: Source, listing: Listing, limits: UploadLimits) -> None:
    """Before anything is read."""
    if not listing.files:
        raise refuse("missing_file", f"{source.shown[:200]} holds none of an adapter's files, such as {WEIGHTS}")
    if len(listing.files) > limits.max_files:
        raise UploadTooLarge(f"{len(listing.files)} files, the limit is {limits.max_files} (max_upload_files)")
    if (total := listing.total_bytes) is not None and total > limits.max_bytes:
        raise UploadTooLarge(f"{source.shown[:200]} has {total} bytes, the limit is {limits.max_bytes}")


def _require_time_and_room(source: Source, done: int, limits: UploadLimits, deadline: float) -> None:
    if done > limits.max_bytes:
        raise UploadTooLarge(f"{source.shown[:200]} sends more than {limits.max_bytes} bytes, the limit")
    if time.monotonic() > deadline:
        raise SourceUnavailable(
            f"{source.shown[:200]} took longer than this server waits (source_timeout_s)", code="source_timeout"
        )


def _copy(source: Source, file: RemoteFile, path: Path) -> Iterator[int]:
    """Yields how many bytes were written, chunk by chunk."""
    digest, written = hashlib.sha256(), 0
    with _writing(path) as write, ExitStack() as stack:
        with reporting(source):
            stream = stack.enter_context(file.open())
        while chunk := _read(source, stream):
            write(chunk)
            digest.update(chunk)
            written += len(chunk)
            yield len(chunk)
    if file.size not in (None, written) or file.sha256 not in (None, digest.hexdigest()):
        raise SourceUnavailable(
            f"{file.name} of {source.shown[:200]} arrived damaged: {written} bytes with the SHA-256 "
            f"{digest.hexdigest()}, expected {file.size} bytes with {file.sha256 or 'any'}; try again",
            code="source_damaged",
        )


def _read(source: Source, stream: Readable) -> bytes:
    with reporting(source):
        return stream.read(CHUNK_BYTES)


@contextmanager
def _writing(path: Path) -> Iterator[Callable[[bytes], object]]:
    try:
        with path.open("xb") as file:
            yield file.write
    except OSError as error:  # of the disk here: what the source raises has become an error of ours before
        raise StoreError(f"could not write {path.name}: {error}; check the disk's space and permissions") from error
