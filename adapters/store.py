"""The seam behind which adapter files lie: what every store promises, and the digest that names a set of files.

`adapters.local_store` keeps them on a disk, `adapters.object_store` in a bucket; `adapters.storage` chooses. A store
knows digests and files; what they mean and who refers to them is the registry's affair.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from adapters.errors import StoreError

DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
BLOB = re.compile(r"[0-9a-f]{64}")


class Store(Protocol):
    """Blobs: sets of files, named by their digest, whole or not there, never changed.

    Every method is safe from several threads and processes, and none leaves half a blob that counts as whole, whenever
    it is killed. Raises StoreError.
    """

    @property
    def location(self) -> str:
        """Where the files are, for a person."""

    def lock(self) -> AbstractContextManager[None]:
        """Held by whoever makes the blobs and the registry agree. Not reentrant."""

    def owner(self) -> str | None:
        """The registry that it is tied to."""

    def claim(self, registry: str) -> None:
        """Tie this store to one registry. StoreError for any other one: its sweep would delete every blob here."""

    def staging(self) -> AbstractContextManager[Path]:
        """A fresh local directory; removed on exit if it was not published."""

    def prepare(self, staged: Path, digest: str) -> None:
        """What `publish` can do before it is known whether the blob will be kept: to be called without the lock."""

    def publish(self, staged: Path, digest: str) -> Path:
        """Make `staged` the blob of `digest`, durably. A blob that is there already wins."""

    def at_hand(self, digest: str) -> Path | None:
        """Its directory on this machine, or None where `path` would have to fetch it or would fail. Never waits."""

    def path(self, digest: str) -> Path:
        """Its directory on this machine, which nobody may change. May take as long as a download."""

    def delete(self, digest: str) -> None:
        """Deleting what is not there is no error."""

    def leftovers(self, keep: Collection[str]) -> list[str]:
        """What `sweep` would remove: staging that a crash left, and blobs not in `keep`."""

    def sweep(self, keep: Collection[str]) -> list[str]:
        """Remove what a crash left; returns what went. A blob is named by its digest."""

    def size_bytes(self) -> int:
        """Of all blobs together."""

    def digests(self) -> list[str]:
        """Of all whole blobs, sorted."""

    def hashes(self, digest: str) -> Mapping[str, str]:
        """File name → `sha256` hex of the bytes as they now are where they are kept; empty when nothing is there."""

    def mend(self, digest: str, files: Mapping[str, str], *, dry_run: bool = False) -> list[str]:
        """Put right what whole files of this blob can put right, wherever they are; says what was, or is, wrong.

        `files`: its hashes, just read.
        """


def digest_files(directory: Path) -> tuple[str, Mapping[str, str]]:
    """`sha256:<hex>` over the sorted names and bytes of the directory's files, and name → `sha256` hex."""
    files = hash_files(directory)
    return digest_of(files), files


def hash_files(directory: Path) -> dict[str, str]:
    return {path.name: _sha256(path) for path in sorted(directory.iterdir())}


def digest_of(files: Mapping[str, str]) -> str:
    """Of name → `sha256` hex."""
    listing = json.dumps(sorted(files.items()), separators=(",", ":"))
    return f"sha256:{hashlib.sha256(listing.encode()).hexdigest()}"


def blob_name(digest: str) -> str:
    """The 64 hex digits of a digest, and nothing else: it becomes part of a path."""
    match = DIGEST.fullmatch(digest)
    if match is None:
        raise StoreError(f"{digest!r} is not a digest; expected sha256: and 64 lower-case hex digits")
    return match[1]


def require_owner(location: str, owner: str | None, registry: str) -> None:
    """StoreError when the store belongs to another registry than the one that was opened."""
    if owner != registry:
        raise StoreError(
            f"the store {location} belongs to {f'registry {owner}' if owner else 'no registry'}, but the database is "
            f"registry {registry}; "
            "point database_url and data_dir (or store_url) at a pair that belongs together",
            code="other_registry",
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
