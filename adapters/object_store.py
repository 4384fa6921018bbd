"""Adapter files by digest where fsspec reaches (`s3://bucket/prefix`, `gs://…`), with copies on this disk.

    blobs/<64 hex>/<file>   written first
    whole/<64 hex>          written last: the blob's files and their sums; without it the blob is not there
    registry                which registry this belongs to
    parts/<uuid>            half-written, where the driver writes in place and must rename

The engine reads files from a disk, so a blob is fetched once into a local store and checked against its digest. These
copies are never evicted: the engine may read any of them again, whenever it likes. `lock` serialises the writers of
this machine; those of several machines the registry serialises, which they share.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from adapters.bucket import PARTS, Bucket
from adapters.errors import StoreError
from adapters.local_store import LocalStore
from adapters.store import BLOB, blob_name, digest_files, digest_of, require_owner

GRACE_S = 3600.0
"""Younger files are never swept: another machine may be about to register them."""
OWNER = "registry"


class ObjectStore:
    """`adapters.store.Store` behind the fsspec URL `url`. `root`: a local directory for staging and copies."""

    def __init__(self, url: str, root: Path, *, grace_s: float = GRACE_S) -> None:
        self._bucket = Bucket(url)
        self._grace_s = grace_s
        self._copies = LocalStore(root)
        self._fetches = Path(root) / "fetches"
        self._writers = Path(root) / "writers"
        self._fetches.mkdir(exist_ok=True)
        self._writers.touch()

    @property
    def location(self) -> str:
        return self._bucket.url

    @contextmanager
    def lock(self) -> Iterator[None]:
        with self._writers.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def owner(self) -> str | None:
        found = self._bucket.read(OWNER)
        return None if found is None else found.decode(errors="replace")

    def claim(self, registry: str) -> None:
        if self.owner() is None:
            self._bucket.write_first(OWNER, registry.encode())
        require_owner(self.location, self.owner(), registry)

    @contextmanager
    def staging(self) -> Iterator[Path]:
        with self._copies.staging() as directory:
            yield directory

    def prepare(self, staged: Path, digest: str) -> None:
        """Sends the files: not under the lock, for it takes time. Whoever sweeps leaves young ones alone."""
        name = blob_name(digest)
        if self._marker(name) is None:
            self._send(staged, name)

    def publish(self, staged: Path, digest: str) -> Path:
        name = blob_name(digest)
        if self._marker(name) is not None:
            self._require(digest, digest_of(self.hashes(digest)))
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
        self._bucket.remove(f"whole/{name}")
        self._bucket.remove(f"blobs/{name}")
        self._copies.delete(digest)
        (self._fetches / name).unlink(missing_ok=True)

    def leftovers(self, keep: Collection[str]) -> list[str]:
        return sorted({*self._strangers(keep), *self._old_parts(), *self._copies.leftovers(keep)})

    def sweep(self, keep: Collection[str]) -> list[str]:
        strangers, parts = self._strangers(keep), self._old_parts()
        for digest in strangers:
            self.delete(digest)
        for part in parts:
            self._bucket.remove(part)
        return sorted({*strangers, *parts, *self._copies.sweep(keep)})

    def size_bytes(self) -> int:
        return sum(sum(files.values()) for files in self._listing().values())

    def digests(self) -> list[str]:
        return [f"sha256:{name}" for name in sorted(self._marked())]

    def hashes(self, digest: str) -> Mapping[str, str]:
        name = blob_name(digest)
        sums = {file: self._bucket.sha256(f"blobs/{name}/{file}") for file in sorted(self._files(name))}
        return {file: found for file, found in sums.items() if found is not None}  # else deleted just now

    def mend(self, digest: str, files: Mapping[str, str], *, dry_run: bool = False) -> list[str]:
        name, copy = blob_name(digest), self._copies.hashes(digest)
        wrong: list[str] = []
        if digest_of(files) != digest and digest_of(copy) == digest:
            wrong.append(f"the files in {self.location} are damaged or gone, the copy on this machine is whole")
            if not dry_run:
                self._bucket.remove(f"blobs/{name}")
                self._send(self._copies.path(digest), name)
                files = copy
        if digest_of(files) != digest:
            return wrong
        if self._marker(name) != files:
            wrong.append(f"the files in {self.location} are whole, but not marked so")
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
        there, ours = self._files(name), {path.name: path for path in sorted(staged.iterdir())}
        for file in there.keys() - ours.keys():
            self._bucket.remove(f"blobs/{name}/{file}")
        for file, path in ours.items():
            if there.get(file) != path.stat().st_size:
                self._bucket.put(path, f"blobs/{name}/{file}")

    def _mark(self, name: str, files: Mapping[str, str]) -> None:
        self._bucket.write(f"whole/{name}", json.dumps(dict(files)).encode())

    def _marker(self, name: str) -> Mapping[str, str] | None:
        """File name → `sha256` hex of a whole blob. One that was cut off while it was written counts as none."""
        try:
            files = json.loads(self._bucket.read(f"whole/{name}") or b"")
        except ValueError:
            return None
        named = isinstance(files, dict) and all("/" not in file and file not in ("", ".", "..") for file in files)
        return files if named else None

    def _fetch(self, digest: str) -> Path:
        name = blob_name(digest)
        files = self._marker(name)
        if files is None:
            raise StoreError(
                f"{digest} is registered, but missing in {self.location}; restore it from a backup or upload it again"
            )
        with self._copies.staging() as staged:
            for file in files:
                self._bucket.get(f"blobs/{name}/{file}", staged / file)
            self._require(digest, digest_files(staged)[0])
            return self._copies.publish(staged, digest)

    def _require(self, digest: str, actual: str) -> None:
        if actual != digest:
            raise StoreError(
                f"the copy of {digest} in {self.location} is damaged (its files hash to {actual}); delete it and "
                "upload again"
            )

    def _files(self, name: str) -> dict[str, int]:
        """Of one blob, whole or not, with their sizes."""
        return self._bucket.sizes(f"blobs/{name}")

    def _listing(self) -> dict[str, dict[str, int]]:
        """The same of all blobs, by name."""
        found: dict[str, dict[str, int]] = {}
        for path, size in self._bucket.sizes("blobs").items():
            blob, _, file = path.partition("/")
            if BLOB.fullmatch(blob) and file:
                found.setdefault(blob, {})[file] = size
        return found

    def _marked(self) -> set[str]:
        return {name for name in self._bucket.sizes("whole") if BLOB.fullmatch(name)}

    def _strangers(self, keep: Collection[str]) -> list[str]:
        """Digests of blobs, whole or not, that nobody refers to and nobody can be about to register."""
        kept, listing, marked = {blob_name(digest) for digest in keep}, self._listing(), self._marked()
        paths = {
            name: [f"blobs/{name}/{file}" for file in listing.get(name, ())] or [f"whole/{name}"]
            for name in sorted({*listing, *marked} - kept)
        }
        return [f"sha256:{name}" for name, files in paths.items() if self._bucket.is_older(self._grace_s, *files)]

    def _old_parts(self) -> list[str]:
        parts = [f"{PARTS}/{name}" for name in sorted(self._bucket.sizes(PARTS))]
        return [part for part in parts if self._bucket.is_older(self._grace_s, part)]
