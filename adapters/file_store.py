"""Data files on a disk, by content: what training reads, and what it leaves for people. Whole or not at all.

root/blobs/<64 hex>      the bytes, once for all files that have them
root/records/<id>.json   one a file: what it is called, what it is for, and its digest
root/staging/<uuid>      half-written; a live one is held by a lock
root/lock                serialises the writers of all threads and processes

It does not know what is in a file.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import secrets
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from adapters.disk import as_store_error, flush
from adapters.errors import NotFound, StoreError, UploadError, UploadTooLarge

ID = re.compile(r"file-[0-9a-f]{23}")
NAME_CHARACTERS = 255
CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class DataFile:
    id: str
    """`file-` and hex digits; a later file's is greater."""
    filename: str
    """As the client called it; never a path of ours."""
    purpose: str
    bytes: int
    sha256: str
    created_at: int
    """Seconds since 1970."""
    created_by: str | None
    """The id of the API key."""


class FileStore:
    """Safe to share between threads and processes."""

    def __init__(self, root: Path) -> None:
        self._blobs, self._records, self._staging = root / "blobs", root / "records", root / "staging"
        self._lock = root / "lock"
        with as_store_error("open the file store"):
            for directory in (self._blobs, self._records, self._staging):
                directory.mkdir(parents=True, exist_ok=True)
            self._lock.touch()

    def create(
        self, stream: BinaryIO, filename: str, purpose: str, *, by: str | None = None, max_bytes: int | None = None
    ) -> DataFile:
        """Raises UploadTooLarge, and UploadError for a file without content or a name that cannot be shown."""
        if not 0 < len(filename) <= NAME_CHARACTERS or not filename.isprintable():
            raise UploadError(
                f"the file is called {filename[:80]!r}; expected 1 to {NAME_CHARACTERS} printable characters",
                code="bad_filename",
            )
        with as_store_error("keep a file"), self._staged() as staged:
            size, digest = _copy(stream, staged, max_bytes)
            made = DataFile(_new_id(), filename, purpose, size, digest, int(time.time()), by)
            with self._alone():
                os.replace(staged, self._blobs / digest)
                self._write_record(made)
        return made

    def file(self, file_id: str) -> DataFile:
        if not ID.fullmatch(file_id):
            raise _unknown(file_id)
        try:
            return DataFile(**json.loads((self._records / f"{file_id}.json").read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise _unknown(file_id) from None
        except OSError as error:
            raise StoreError(f"cannot read what {file_id} is: {error}") from error

    def path(self, file_id: str) -> Path:
        """Where its bytes lie; nobody changes them, but a deletion takes them away."""
        return self._blobs / self.file(file_id).sha256

    def files(
        self, *, after: str = "", limit: int, purpose: str | None = None, oldest_first: bool = False
    ) -> list[DataFile]:
        """The newest first, or the oldest; those behind `after`."""
        ids = sorted((path.stem for path in self._records.glob("file-*.json")), reverse=not oldest_first)
        found: list[DataFile] = []
        for file_id in ids:
            if after and not (file_id > after if oldest_first else file_id < after):
                continue
            try:
                file = self.file(file_id)
            except NotFound:
                continue  # deleted meanwhile
            if purpose in (None, file.purpose):
                found.append(file)
            if len(found) == limit:
                break
        return found

    def delete(self, file_id: str) -> None:
        file = self.file(file_id)
        with as_store_error("delete a file"), self._alone():
            (self._records / f"{file_id}.json").unlink(missing_ok=True)
            flush(self._records)
            if file.sha256 not in self._digests():
                (self._blobs / file.sha256).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Remove what crashes left: half-written files, and bytes that no record names."""
        with as_store_error("sweep the file store"), self._alone():
            for path in self._staging.iterdir():
                with path.open("rb") as file:
                    try:
                        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    except BlockingIOError:
                        continue  # another process writes it just now
                    path.unlink()
            known = self._digests()
            for path in self._blobs.iterdir():
                if path.name not in known:
                    path.unlink()

    def _digests(self) -> set[str]:
        return {json.loads(path.read_text(encoding="utf-8"))["sha256"] for path in self._records.glob("file-*.json")}

    def _write_record(self, file: DataFile) -> None:
        with self._staged() as staged:
            staged.write_text(json.dumps(asdict(file)), encoding="utf-8")
            flush(staged)
            os.replace(staged, self._records / f"{file.id}.json")
        flush(self._blobs)
        flush(self._records)

    @contextmanager
    def _staged(self) -> Iterator[Path]:
        """A place to write; what still lies there at the end of the block goes."""
        path = self._staging / uuid.uuid4().hex
        with ExitStack() as stack:
            held = stack.enter_context(path.open("wb"))
            fcntl.flock(held, fcntl.LOCK_EX)
            stack.callback(path.unlink, missing_ok=True)
            yield path

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with self._lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _copy(stream: BinaryIO, staged: Path, max_bytes: int | None) -> tuple[int, str]:
    size, digest = 0, hashlib.sha256()
    with staged.open("wb") as out:
        while chunk := stream.read(CHUNK_BYTES):
            size += len(chunk)
            if max_bytes is not None and size > max_bytes:
                raise UploadTooLarge(f"the file is larger than the limit of {max_bytes} bytes (max_upload_bytes)")
            digest.update(chunk)
            out.write(chunk)
    if not size:
        raise UploadError("the file is empty; send one with content", code="empty_file")
    flush(staged)
    return size, digest.hexdigest()


def _new_id() -> str:
    return f"file-{time.time_ns() // 1_000_000:011x}{secrets.token_hex(6)}"


def _unknown(file_id: str) -> NotFound:
    return NotFound(f"there is no file {file_id[:80]!r}; `GET /v1/files` lists those that are there")
