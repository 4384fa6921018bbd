"""Adapter files by digest where fsspec reaches (`s3://bucket/prefix`, `gs://…`), with copies on this disk.

    prefix/blobs/<64 hex>/<file>   written first
    prefix/whole/<64 hex>          written last: the blob's files; without it the blob is not there
    prefix/registry                which registry this belongs to
    prefix/parts/<uuid>            half-written, where the driver writes in place and must rename

The engine reads files from a disk, so a blob is fetched once into a local store and checked against its digest. These
copies are never evicted: the engine may read any of them again, whenever it likes. `lock` serialises the writers of
this machine; those of several machines the registry serialises, which they share.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import time
import uuid
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import fsspec

from adapters.errors import AdapterError, StoreError, StoreUnreachable
from adapters.local_store import LocalStore
from adapters.store import BLOB, blob_name, digest_files, digest_of, require_owner

GRACE_S = 3600.0
"""Younger files are never swept: another machine may be about to register them."""
PUTS_WHOLE = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oss", "oci", "hf"}
"""Protocols whose objects appear whole. Anything else is taken for a file system, whose files grow."""
OPTIONS: dict[str, dict[str, Any]] = {
    # Fail fast: the callers wait, and ask again.
    "s3": {"config_kwargs": {"connect_timeout": 5, "retries": {"max_attempts": 2}}},
    "file": {"auto_mkdir": True},
}


class ObjectStore:
    """`adapters.store.Store` behind the fsspec URL `url`. `root`: a local directory for staging and copies."""

    def __init__(self, url: str, root: Path, *, grace_s: float = GRACE_S) -> None:
        self._url = url.rstrip("/")
        self._grace_s = grace_s
        self._copies = LocalStore(root)
        self._fetches = Path(root) / "fetches"
        self._writers = Path(root) / "writers"
        self._fetches.mkdir(exist_ok=True)
        self._writers.touch()
        protocol = url.partition(":")[0]
        self._puts_whole, options = protocol in PUTS_WHOLE, OPTIONS.get(protocol, {})
        with self._calling("be opened"):
            self._bucket, prefix = fsspec.core.url_to_fs(self._url, use_listings_cache=False, **options)
        self._blobs, self._whole, self._parts = (f"{prefix}/{name}" for name in ("blobs", "whole", "parts"))
        self._owner = f"{prefix}/registry"

    @property
    def location(self) -> str:
        return self._url

    @contextmanager
    def lock(self) -> Iterator[None]:
        with self._writers.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def owner(self) -> str | None:
        with self._calling("tell which registry it belongs to"), suppress(FileNotFoundError):
            return str(self._bucket.cat_file(self._owner).decode(errors="replace"))
        return None

    def claim(self, registry: str) -> None:
        if self.owner() is None:
            with self._calling("be tied to a registry"), suppress(FileExistsError):
                self._bucket.pipe_file(self._owner, registry.encode(), mode="create")
        require_owner(self._url, self.owner() or "", registry)

    @contextmanager
    def staging(self) -> Iterator[Path]:
        with self._copies.staging() as directory:
            yield directory

    def prepare(self, staged: Path, digest: str) -> None:
        """Sends the files: not under the lock, for it takes time. Whoever sweeps leaves young ones alone."""
        with self._calling(f"take {digest}"):
            if self._marker(blob_name(digest)) is None:
                self._send(staged, blob_name(digest))

    def publish(self, staged: Path, digest: str) -> Path:
        name = blob_name(digest)
        with self._calling(f"take {digest}"):
            if self._marker(name) is not None:
                self._require_intact(digest)
            else:
                self._send(staged, name)
                self._mark(name, digest_files(staged)[1])
        return self._copies.publish(staged, digest)

    def at_hand(self, digest: str) -> Path | None:
        return self._copies.at_hand(digest)

    def path(self, digest: str) -> Path:
        here = self._copies.at_hand(digest)
        if here is not None:
            return here
        with (self._fetches / blob_name(digest)).open("wb") as turn:  # one fetch, however many ask, in any process
            fcntl.flock(turn, fcntl.LOCK_EX)
            return self._copies.at_hand(digest) or self._fetch(digest)

    def delete(self, digest: str) -> None:
        name = blob_name(digest)
        with self._calling(f"delete {digest}"):
            self._remove(f"{self._whole}/{name}")
            self._remove(f"{self._blobs}/{name}")
        self._copies.delete(digest)
        (self._fetches / name).unlink(missing_ok=True)

    def leftovers(self, keep: Collection[str]) -> list[str]:
        found = {f"sha256:{name}" for name in self._strangers(keep)}
        parts = {f"parts/{path.rpartition('/')[2]}" for path in self._old_parts()}
        return sorted(found.union(parts, self._copies.leftovers(keep)))

    def sweep(self, keep: Collection[str]) -> list[str]:
        found = {f"sha256:{name}" for name in self._strangers(keep)}
        for digest in sorted(found):
            self.delete(digest)
        parts = set()
        for path in self._old_parts():
            self._remove(path)
            parts.add(f"parts/{path.rpartition('/')[2]}")
        return sorted(found.union(parts, self._copies.sweep(keep)))

    def size_bytes(self) -> int:
        return sum(size for files in self._listing().values() for size in files.values())

    def digests(self) -> list[str]:
        return [f"sha256:{name}" for name in sorted(self._marked())]

    def hashes(self, digest: str) -> Mapping[str, str]:
        name = blob_name(digest)
        with self._calling(f"read {digest}"):
            return {file: self._sha256(name, file) for file in sorted(self._listing(name).get(name, {}))}

    def mend(self, digest: str, files: Mapping[str, str], *, dry_run: bool = False) -> list[str]:
        name, copy = blob_name(digest), self._copies.hashes(digest)
        wrong: list[str] = []
        if digest_of(files) != digest and digest_of(copy) == digest:
            wrong.append(f"the files in {self._url} are damaged or gone, the copy on this machine is whole")
            if not dry_run:
                self._remove(f"{self._blobs}/{name}")
                self._send(self._copies.path(digest), name)
                files = copy
        if digest_of(files) != digest:
            return wrong
        with self._calling(f"mend {digest}"):
            if self._marker(name) != files:
                wrong.append(f"the files in {self._url} are whole, but not marked so")
                if not dry_run:
                    self._mark(name, files)
        if copy and digest_of(copy) != digest:
            wrong.append("the copy on this machine is damaged")
            if not dry_run:
                self._copies.delete(digest)
                self.path(digest)
        return wrong

    def _send(self, staged: Path, name: str) -> None:
        """What is there already, with this size, came from an earlier attempt with the same bytes."""
        there = self._listing(name).get(name, {})
        ours = {path.name: path for path in sorted(staged.iterdir())}
        for file in there.keys() - ours.keys():
            self._bucket.rm_file(f"{self._blobs}/{name}/{file}")
        for file, path in ours.items():
            if there.get(file) != path.stat().st_size:
                with self._put(f"{self._blobs}/{name}/{file}") as target:
                    self._bucket.put_file(str(path), target)

    def _mark(self, name: str, files: Mapping[str, str]) -> None:
        with self._put(f"{self._whole}/{name}") as target:
            self._bucket.pipe_file(target, json.dumps(dict(files)).encode())

    @contextmanager
    def _put(self, path: str) -> Iterator[str]:
        """Where to write what shall appear at `path`, whole: somebody may read what is there."""
        if self._puts_whole:
            yield path
            return
        part = f"{self._parts}/{uuid.uuid4().hex}"
        yield part
        self._bucket.makedirs(path.rpartition("/")[0], exist_ok=True)
        self._bucket.mv(part, path)

    def _marker(self, name: str) -> Mapping[str, str] | None:
        """File name → `sha256` hex of a whole blob. One that was cut off while it was written counts as none."""
        try:
            files = json.loads(self._bucket.cat_file(f"{self._whole}/{name}"))
        except (FileNotFoundError, ValueError):
            return None
        named = isinstance(files, dict) and all("/" not in file and file not in ("", ".", "..") for file in files)
        return files if named else None

    def _fetch(self, digest: str) -> Path:
        name = blob_name(digest)
        with self._copies.staging() as staged:
            with self._calling(f"give {digest}"):
                files = self._marker(name)
                if files is None:
                    raise StoreError(
                        f"{digest} is registered, but missing in {self._url}; restore it from a backup or "
                        "upload it again"
                    )
                for file in files:
                    with suppress(FileNotFoundError):  # its digest will tell
                        self._bucket.get_file(f"{self._blobs}/{name}/{file}", str(staged / file))
            _require(digest, digest_files(staged)[0], self._url)
            return self._copies.publish(staged, digest)

    def _require_intact(self, digest: str) -> None:
        _require(digest, digest_of(self.hashes(digest)), self._url)

    def _sha256(self, name: str, file: str) -> str:
        with self._bucket.open(f"{self._blobs}/{name}/{file}", "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    def _listing(self, name: str = "") -> dict[str, dict[str, int]]:
        """Blob → file → size, of one blob or of all, whole or not."""
        found: dict[str, dict[str, int]] = {}
        with self._calling("list its files"):
            for path, facts in self._bucket.find(f"{self._blobs}/{name}".rstrip("/"), detail=True).items():
                blob, _, file = path.rpartition(f"{self._blobs}/")[2].partition("/")
                if BLOB.fullmatch(blob) and file:
                    found.setdefault(blob, {})[file] = facts["size"]
        return found

    def _marked(self) -> set[str]:
        with self._calling("list its files"):
            names = {path.rpartition("/")[2] for path in self._bucket.find(self._whole)}
        return {name for name in names if BLOB.fullmatch(name)}

    def _strangers(self, keep: Collection[str]) -> list[str]:
        """Blobs, whole or not, that nobody refers to and nobody can be about to register."""
        kept, listing, marked = {blob_name(digest) for digest in keep}, self._listing(), self._marked()
        with self._calling("tell the age of its files"):
            return [name for name in sorted({*listing, *marked} - kept) if self._is_old(*self._paths(name, listing))]

    def _old_parts(self) -> list[str]:
        with self._calling("list its files"):
            return [path for path in sorted(self._bucket.find(self._parts)) if self._is_old(path)]

    def _paths(self, name: str, listing: Mapping[str, Collection[str]]) -> list[str]:
        return [f"{self._blobs}/{name}/{file}" for file in listing.get(name, ())] or [f"{self._whole}/{name}"]

    def _is_old(self, *paths: str) -> bool:
        try:
            youngest: float = max(self._bucket.modified(path).timestamp() for path in paths)
        except (NotImplementedError, FileNotFoundError):  # a driver that cannot tell, or somebody deletes it just now
            return False
        return youngest <= time.time() - self._grace_s

    def _remove(self, path: str) -> None:
        with suppress(FileNotFoundError):
            self._bucket.rm(path, recursive=True)

    @contextmanager
    def _calling(self, action: str) -> Iterator[None]:
        """Each driver raises errors of its own (botocore's, aiohttp's): whatever it is, the store did not do it."""
        try:
            yield
        except AdapterError:
            raise
        except Exception as error:
            reason = str(error) or type(error).__name__
            raise StoreUnreachable(
                f"the store {self._url} could not {action}: {reason}; check store_url, the driver's credentials and "
                "endpoint in the environment, and that the bucket exists"
            ) from error


def _require(digest: str, actual: str, url: str) -> None:
    if actual != digest:
        raise StoreError(
            f"the copy of {digest} in {url} is damaged (its files hash to {actual}); delete it and upload again"
        )
