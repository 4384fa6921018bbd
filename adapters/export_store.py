"""Exports on a disk: a record for each, and its files, which appear whole.

root/<id>.json   what was asked for; when it is ready, what it holds
root/<id>/       its files

The id follows from what was asked for: the same adapter, base, format and options are one export. It does not know how
an export is made, nor what its job is doing.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import threading
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from adapters.disk import as_store_error, flush
from adapters.errors import NotFound, StoreError

ID = re.compile(r"exp-[0-9a-f]{24}")


@dataclass(frozen=True)
class ExportFile:
    name: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Export:
    id: str
    adapter: str
    """`name@number` under which it was asked for first."""
    digest: str
    """Of the adapter."""
    base: Mapping[str, str]
    """`name` and `fingerprint`."""
    format: str
    options: Mapping[str, Any]
    estimated_bytes: int
    job: str
    created_at: int
    """Seconds since 1970, as all times here."""
    created_by: str | None
    ready_at: int | None = None
    expires_at: int | None = None
    """None: it is not ready, or stays until somebody deletes it."""
    files: tuple[ExportFile, ...] = ()
    report: Mapping[str, Any] = field(default_factory=dict)
    """What was measured, and by which library."""

    @property
    def size_bytes(self) -> int:
        """What it takes, or will take as far as one can say."""
        return sum(file.size_bytes for file in self.files) if self.ready_at else self.estimated_bytes

    def file(self, name: str) -> ExportFile:
        for each in self.files:
            if each.name == name:
                return each
        raise NotFound(f"{self.id} has no file {name[:140]!r}; it has {', '.join(each.name for each in self.files)}")


def id_of(digest: str, fingerprint: str, format_: str, options: Mapping[str, Any]) -> str:
    told = json.dumps([digest, fingerprint, format_, dict(options)], sort_keys=True)
    return f"exp-{hashlib.sha256(told.encode()).hexdigest()[:24]}"


class ExportStore:
    """Safe to share between threads; it belongs to one server."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.alone = threading.RLock()
        """Held by whoever decides by what is there."""
        with as_store_error("open the exports"):
            root.mkdir(parents=True, exist_ok=True)

    def find(self, export_id: str) -> Export | None:
        if not ID.fullmatch(export_id):
            return None
        try:
            values = json.loads(self._record(export_id).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StoreError(f"cannot read what {export_id} is: {error}") from error
        return Export(**{**values, "files": tuple(ExportFile(**each) for each in values["files"])})

    def export(self, export_id: str) -> Export:
        found = self.find(export_id)
        if found is None:
            raise NotFound(f"there is no export {export_id[:80]!r}; `GET /v1/exports` lists those that are there")
        return found

    def exports(self) -> list[Export]:
        """The newest first."""
        found = [self.find(path.stem) for path in self._root.glob("exp-*.json")]
        there = [each for each in found if each is not None]
        return sorted(there, key=lambda each: (each.created_at, each.id), reverse=True)

    def path(self, export_id: str) -> Path:
        """Where its files lie, or will."""
        return self._root / export_id

    def keep(self, export: Export) -> None:
        """Write its record."""
        part = self._root / f".{uuid.uuid4().hex}"
        with as_store_error("keep an export"):
            with part.open("w", encoding="utf-8") as file:
                json.dump(asdict(export), file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, self._record(export.id))
            flush(self._root)

    def take_in(self, export: Export, made: Path) -> None:
        """`made`, a directory on the same disk that is flushed already, becomes its files."""
        with as_store_error("keep an export"), self.alone:
            if not made.exists() and self.path(export.id).exists():
                return  # before a crash
            shutil.rmtree(self.path(export.id), ignore_errors=True)
            made.rename(self.path(export.id))
            flush(self._root)

    def ready(self, export: Export, at: int, expires_at: int | None) -> Export:
        made = replace(export, ready_at=at, expires_at=expires_at)
        self.keep(made)
        return made

    def delete(self, export_id: str) -> None:
        """Who reads a file of it reads on."""
        with as_store_error("delete an export"), self.alone:
            self._record(export_id).unlink(missing_ok=True)
            flush(self._root)
            shutil.rmtree(self.path(export_id), ignore_errors=True)

    def sweep(self, now: int) -> list[str]:
        """Ids that went: those that expired, and what crashes left."""
        with as_store_error("sweep the exports"), self.alone:
            known = {each.id: each for each in self.exports()}
            gone = [each.id for each in known.values() if each.expires_at is not None and each.expires_at <= now]
            for path in self._root.iterdir():
                if path.is_dir() and path.name not in known:
                    gone.append(path.name)
                elif path.name.startswith("."):
                    path.unlink()
            for export_id in gone:
                self.delete(export_id)
        return sorted(gone)

    def _record(self, export_id: str) -> Path:
        return self._root / f"{export_id}.json"
