"""Adapter files by digest on a local disk: staged, flushed, renamed into place once, never changed afterwards.

    root/blobs/<64 hex>/…     whole and immutable
    root/staging/<uuid>/…     half-made; a live one is held by a lock on its directory
    root/lock                 serialises the writers of all threads and processes

It knows digests and files; what they mean and who refers to them is the registry's affair.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from adapters.errors import StoreError

DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
BLOB = re.compile(r"[0-9a-f]{64}")


def digest_files(directory: Path) -> tuple[str, Mapping[str, str]]:
    """`sha256:<hex>` over the sorted names and bytes of the directory's files, and name → `sha256` hex."""
    files = {path.name: _sha256(path) for path in sorted(directory.iterdir())}
    listing = json.dumps(sorted(files.items()), separators=(",", ":"))
    return f"sha256:{hashlib.sha256(listing.encode()).hexdigest()}", files


class LocalStore:
    """Every method is safe from several threads and processes; none leaves half a blob, whenever it is killed."""

    def __init__(self, root: Path) -> None:
        self._blobs = Path(root) / "blobs"
        self._staging = Path(root) / "staging"
        self._lock = Path(root) / "lock"
        self._owner = Path(root) / "registry"
        with _as_store_error("open the store"):
            self._blobs.mkdir(parents=True, exist_ok=True)
            self._staging.mkdir(exist_ok=True)
            self._lock.touch()

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Held by whoever makes the blobs and the registry agree. Not reentrant."""
        with self._lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def claim(self, registry: str) -> None:
        """Tie this store to one registry. StoreError for any other one: its sweep would delete every blob here."""
        with self.lock(), _as_store_error("read which registry the store belongs to"):
            if not self._owner.exists():
                staged = self._owner.with_suffix(".new")
                staged.write_text(registry)
                _fsync(staged)
                staged.rename(self._owner)
                _fsync(self._owner.parent)
            owner = self._owner.read_text()
        if owner != registry:
            raise StoreError(
                f"the store {self._blobs.parent} belongs to registry {owner}, but the database is registry {registry}; "
                "point database_url and data_dir at a pair that belongs together",
                code="other_registry",
            )

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """A fresh directory; removed on exit if it was not published."""
        directory = self._staging / uuid.uuid4().hex
        with ExitStack() as stack:
            with self.lock(), _as_store_error("make a staging directory"):
                directory.mkdir()
                stack.callback(shutil.rmtree, directory, ignore_errors=True)
                stack.enter_context(_held(directory))
            yield directory

    def publish(self, staged: Path, digest: str) -> Path:
        """Make `staged` the blob of `digest`, durably. A blob that is there already wins."""
        blob = self._blob(digest)
        with _as_store_error(f"publish {digest}"):
            if not blob.exists():
                _settle(staged)
                _rename_unless_there(staged, blob)
                _fsync(self._blobs)
            if staged.exists():
                _require_intact(blob, digest)
                shutil.rmtree(staged)
        return blob

    def path(self, digest: str) -> Path:
        blob = self._blob(digest)
        if not blob.is_dir():
            raise StoreError(
                f"{digest} is registered, but {blob} is missing; restore it from a backup or upload it again"
            )
        return blob

    def delete(self, digest: str) -> None:
        """Deleting what is not there is no error."""
        self._discard(self._blob(digest))

    def sweep(self, keep: Collection[str]) -> list[str]:
        """Remove what a crash left: staging nobody holds, and blobs not in `keep`. Returns what went."""
        gone = [f"staging/{path.name}" for path in sorted(self._staging.iterdir()) if _remove_unless_held(path)]
        kept = {self._blob(digest).name for digest in keep}
        for blob in sorted(self._blobs.iterdir()):
            if BLOB.fullmatch(blob.name) and blob.name not in kept:
                self._discard(blob)
                gone.append(f"sha256:{blob.name}")
        return gone

    def size_bytes(self) -> int:
        return sum(path.stat().st_size for path in self._blobs.rglob("*") if path.is_file())

    def _blob(self, digest: str) -> Path:
        match = DIGEST.fullmatch(digest)
        if match is None:
            raise StoreError(f"{digest!r} is not a digest; expected sha256: and 64 lower-case hex digits")
        return self._blobs / match[1]

    def _discard(self, blob: Path) -> None:
        """Out of sight in one rename, then removed: a crash in between leaves staging, not half a blob."""
        with _as_store_error(f"delete {blob.name}"), suppress(FileNotFoundError):
            doomed = self._staging / uuid.uuid4().hex
            blob.rename(doomed)
            _fsync(self._blobs)
            shutil.rmtree(doomed)


@contextmanager
def _as_store_error(action: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(f"could not {action}: {error}; check the disk's space and permissions") from error


@contextmanager
def _held(directory: Path) -> Iterator[None]:
    """A lock on the directory itself ends with its holder, even by SIGKILL: `sweep` can tell live from left over."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _remove_unless_held(directory: Path) -> bool:
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(directory, ignore_errors=True)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return not directory.exists()


def _rename_unless_there(staged: Path, blob: Path) -> None:
    try:
        staged.rename(blob)
    except OSError:
        if not blob.exists():
            raise


def _require_intact(blob: Path, digest: str) -> None:
    actual, _ = digest_files(blob)
    if actual != digest:
        raise StoreError(
            f"the stored copy of {digest} is damaged (its files hash to {actual}); delete it and upload again"
        )


def _settle(directory: Path) -> None:
    """Readable by other users (safetensors writes 0600) and on the disk, before it gets its name."""
    directory.chmod(0o755)
    for path in directory.iterdir():
        path.chmod(0o644)
        _fsync(path)
    _fsync(directory)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
