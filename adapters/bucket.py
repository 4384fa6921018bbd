"""A folder of any store that fsspec has a driver for: read, write whole, list, remove. Knows nothing of what is in it.

Every driver raises errors of its own (botocore's, aiohttp's); whatever it is, the store did not do what was asked.
"""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import fsspec

from adapters.errors import StoreUnreachable

PUTS_WHOLE = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oss", "oci"}
"""Protocols whose objects appear whole. Anything else is taken for a file system, whose files grow."""
OPTIONS: dict[str, dict[str, Any]] = {
    # Fail fast: the callers wait, and ask again.
    "s3": {"config_kwargs": {"connect_timeout": 5, "retries": {"max_attempts": 2}}},
    "file": {"auto_mkdir": True},
}
PARTS = "parts"
"""Where files grow until they are renamed."""


class Bucket:
    """Paths are relative to `url`. Raises StoreUnreachable."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        protocol = url.partition(":")[0]
        self._puts_whole = protocol in PUTS_WHOLE
        with self._doing("be opened"):
            self._system, self._root = fsspec.core.url_to_fs(
                self.url, use_listings_cache=False, **OPTIONS.get(protocol, {})
            )

    def read(self, path: str) -> bytes | None:
        """None where there is no such file."""
        with self._doing(f"read {path}"), suppress(FileNotFoundError):
            return bytes(self._system.cat_file(self._at(path)))
        return None

    def write(self, path: str, content: bytes) -> None:
        with self._doing(f"write {path}"), self._growing(path) as target:
            self._system.pipe_file(target, content)

    def write_first(self, path: str, content: bytes) -> None:
        """Nothing where somebody else was first, as far as the driver can tell."""
        with self._doing(f"write {path}"), suppress(FileExistsError):
            self._system.pipe_file(self._at(path), content, mode="create")

    def put(self, file: Path, path: str) -> None:
        with self._doing(f"write {path}"), self._growing(path) as target:
            self._system.put_file(str(file), target)

    def get(self, path: str, file: Path) -> None:
        """Nothing where there is no such file."""
        with self._doing(f"read {path}"), suppress(FileNotFoundError):
            self._system.get_file(self._at(path), str(file))

    def sha256(self, path: str) -> str | None:
        with (
            self._doing(f"read {path}"),
            suppress(FileNotFoundError),
            self._system.open(self._at(path), "rb") as stream,
        ):
            return hashlib.file_digest(stream, "sha256").hexdigest()
        return None

    def sizes(self, folder: str) -> dict[str, int]:
        """Of all files below it, by their path relative to the folder."""
        start = f"{self._at(folder)}/"
        with self._doing(f"list {folder}"):
            found = self._system.find(self._at(folder), detail=True)
        return {path.rpartition(start)[2]: int(facts["size"]) for path, facts in found.items()}

    def remove(self, path: str) -> None:
        """A file, or a folder with all that is below it."""
        with self._doing(f"delete {path}"), suppress(FileNotFoundError):
            self._system.rm(self._at(path), recursive=True)

    def is_older(self, age_s: float, *paths: str) -> bool:
        """Whether every one of them is. False where the driver cannot tell, or somebody deletes one just now."""
        with self._doing("tell the age of its files"), suppress(NotImplementedError, FileNotFoundError):
            youngest: float = max(self._system.modified(self._at(path)).timestamp() for path in paths)
            return youngest <= time.time() - age_s
        return False

    def _at(self, path: str) -> str:
        return f"{self._root}/{path}"

    @contextmanager
    def _growing(self, path: str) -> Iterator[str]:
        """Where to write what shall appear at `path` whole: somebody may be reading what is there."""
        target = self._at(path)
        if self._puts_whole:
            yield target
            return
        part = self._at(f"{PARTS}/{uuid.uuid4().hex}")
        yield part
        self._system.makedirs(target.rpartition("/")[0], exist_ok=True)
        self._system.mv(part, target)

    @contextmanager
    def _doing(self, action: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            reason = str(error) or type(error).__name__
            raise StoreUnreachable(
                f"the store {self.url} could not {action}: {reason}; check store_url, the driver's credentials and "
                "endpoint in the environment, and that the bucket exists"
            ) from error
