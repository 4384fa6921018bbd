"""Data files that a job reads, named by a field of its request: asked for, and linked to where the job finds them."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from adapters.errors import NotFound
from adapters.file_store import DataFile, FileStore
from server.errors import BadRequest

PURPOSE = "fine-tune"
VALIDATION = "validation_file"
"""The field that names rows to measure on."""


def require_data(files: FileStore, param: str, file_id: str) -> DataFile:
    """Raises BadRequest."""
    try:
        file = files.file(file_id)
    except NotFound as error:
        raise BadRequest(error.message, param=param, code="file_not_found") from None
    if file.purpose != PURPOSE:
        raise BadRequest(
            f"{param} {file_id} has the purpose {file.purpose!r}; upload it with the purpose {PURPOSE!r}",
            param=param,
            code="wrong_purpose",
        )
    return file


def link_data(files: FileStore, param: str, file: DataFile, destination: Path) -> None:
    """Another name for the same bytes: who deletes the file then does not take it from the job. Raises BadRequest."""
    if destination.exists():
        return
    destination.parent.mkdir(parents=True, exist_ok=True)
    require_data(files, param, file.id)
    try:
        os.link(files.path(file.id), destination)
    except OSError:  # a file system without links
        part = destination.with_name(destination.name + ".part")
        shutil.copyfile(files.path(file.id), part)
        part.rename(destination)  # a kill in between must not leave half of it to the next attempt


def rows_of(files: FileStore, param: str, file_id: str | None, there: Path) -> tuple[str, ...]:
    """Paths of the rows that a job reads, linked to `there`, in its directory: a later attempt finds them, also where
    the file was deleted meanwhile. Raises BadRequest."""
    if file_id is None:
        return ()
    if not _whole(there):
        file = require_data(files, param, file_id)
        link_data(files, param, file, there.parent / data_path(param, file))
    return _whole(there)


def data_path(param: str, file: DataFile) -> Path:
    """In the job's directory, named so that a message about a row says whose it is."""
    name = re.sub(r"[^\w.-]", "_", Path(file.filename).name, flags=re.ASCII).lstrip(".")[-100:] or "data.jsonl"
    return Path(param) / name


def _whole(there: Path) -> tuple[str, ...]:
    return tuple(str(path) for path in there.glob("*") if path.suffix != ".part")
