"""Adapter files by digest on a local disk: staged, flushed, renamed into place once, never changed afterwards.

root/blobs/<64 hex>/…     whole and immutable
root/staging/<uuid>/…     half-made; a live one is held by a lock on its directory
root/lock                 serialises the writers of all threads and processes
"""

from __future__ import annotations

import fcntl
import os
import shutil
import uuid
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from adapters.disk import as_store_error, flush
from adapters.errors import StoreError
from adapters.store import BLOB, blob_name, digest_files, hash_files, require_owner


class LocalStore:
    """`adapters.store.Store` in the directory `root`."""

    def __init__(self, root: Path) -> None:
        self._root = Path(root)
        self._blobs = self._root / "blobs"
        self._staging = self._root / "staging"
        self._lock = self._root / "lock"
        self._owner = self._root / "registry"
        with as_store_error("open the store"):
            self._blobs.mkdir(parents=True, exist_ok=True)
            self._staging.mkdir(exist_ok=True)
            self._lock.touch()

    @property
    def location(self) -> str:
        return str(self._root)

    @contextmanager
    def lock(self) -> Iterator[None]:
        with self._lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def owner(self) -> str | None:
        with as_store_error("read which registry the store belongs to"):
            return self._owner.read_text() if self._owner.exists() else None

    def claim(self, registry: str) -> None:
        with self.lock(), as_store_error("read which registry the store belongs to"):
            if not self._owner.exists():
                staged = self._owner.with_suffix(".new")
                staged.write_text(registry)
                flush(staged)
                staged.rename(self._owner)
                flush(self._owner.parent)
        require_owner(self.location, self.owner(), registry)

    @contextmanager
    def staging(self) -> Iterator[Path]:
        directory = self._staging / uuid.uuid4().hex
        with ExitStack() as stack:
            with self.lock(), as_store_error("make a staging directory"):
                directory.mkdir()
                stack.callback(shutil.rmtree, directory, ignore_errors=True)
                stack.enter_context(_held(directory))
            yield directory

    def prepare(self, staged: Path, digest: str) -> None:
        """Nothing: on a disk publishing is one rename."""

    def publish(self, staged: Path, digest: str) -> Path:
        blob = self._blob(digest)
        with as_store_error(f"publish {digest}"):
            if not blob.exists():
                _settle(staged)
                _rename_unless_there(staged, blob)
                flush(self._blobs)
            if staged.exists():
                _require_intact(blob, digest)
                shutil.rmtree(staged)
        return blob

    def at_hand(self, digest: str) -> Path | None:
        blob = self._blob(digest)
        return blob if blob.is_dir() else None

    def path(self, digest: str) -> Path:
        blob = self.at_hand(digest)
        if blob is None:
            raise StoreError(
                f"{digest} is registered, but {self._blob(digest)} is missing; restore it from a backup or upload it "
                "again"
            )
        return blob

    def delete(self, digest: str) -> None:
        self._discard(self._blob(digest))

    def leftovers(self, keep: Collection[str]) -> list[str]:
        left = [f"staging/{path.name}" for path in sorted(self._staging.iterdir()) if not _is_held(path)]
        return left + [f"sha256:{blob.name}" for blob in self._strangers(keep)]

    def sweep(self, keep: Collection[str]) -> list[str]:
        gone = [f"staging/{path.name}" for path in sorted(self._staging.iterdir()) if _remove_unless_held(path)]
        for blob in self._strangers(keep):
            self._discard(blob)
            gone.append(f"sha256:{blob.name}")
        return gone

    def size_bytes(self) -> int:
        return sum(path.stat().st_size for path in self._blobs.rglob("*") if path.is_file())

    def digests(self) -> list[str]:
        return [f"sha256:{blob.name}" for blob in sorted(self._blobs.iterdir()) if BLOB.fullmatch(blob.name)]

    def hashes(self, digest: str) -> Mapping[str, str]:
        blob = self._blob(digest)
        with as_store_error(f"read {digest}"), suppress(FileNotFoundError):  # deleted just now
            return hash_files(blob)
        return {}

    def mend(self, digest: str, files: Mapping[str, str], *, dry_run: bool = False) -> list[str]:
        """Nothing: there is one copy, and no other to restore it from."""
        return []

    def _blob(self, digest: str) -> Path:
        return self._blobs / blob_name(digest)

    def _strangers(self, keep: Collection[str]) -> list[Path]:
        kept = {blob_name(digest) for digest in keep}
        return [each for each in sorted(self._blobs.iterdir()) if BLOB.fullmatch(each.name) and each.name not in kept]

    def _discard(self, blob: Path) -> None:
        """Out of sight in one rename, then removed: a crash in between leaves staging, not half a blob."""
        with as_store_error(f"delete {blob.name}"), suppress(FileNotFoundError):
            doomed = self._staging / uuid.uuid4().hex
            blob.rename(doomed)
            flush(self._blobs)
            shutil.rmtree(doomed)


@contextmanager
def _held(directory: Path) -> Iterator[None]:
    """A lock on the directory itself ends with its holder, even by SIGKILL: `sweep` can tell live from left over."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _is_held(directory: Path) -> bool:
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except FileNotFoundError:
        return True  # it was, until a moment ago
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


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
        flush(path)
    flush(directory)
