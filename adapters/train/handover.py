"""The last stage: a finished adapter goes where it will be served, over HTTP or into a local registry.

It knows the API's upload call and nothing of how the server keeps what it gets.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from adapters.base import BaseModel
from adapters.errors import InvalidAdapter, NotServable, RemoteRefusal, RemoteUnreachable, TrainError
from adapters.gate import judge
from adapters.manifest import Manifest
from adapters.remote import Remote
from adapters.upload import is_kept

REFUSED = range(400, 500)
NOT_ABOUT_THE_ADAPTER = {401, 403, 404, 408, 429}


def check_servable(directory: Path, base: Path, max_rank: int, max_error: float = 0.0) -> Manifest:
    """The server's own gate, on a copy: what passes is not refused on upload by a server with this base and rank limit.

    What can only be merged is not servable either: no request can ask for it by name.
    """
    kept = f"The adapter is kept in {directory}."
    try:
        with TemporaryDirectory() as scratch:
            copy = _copy(directory, Path(scratch) / directory.name)
            served = BaseModel.read(base)
            manifest = judge(copy, served, max_rank, max_error)
    except InvalidAdapter as error:
        raise NotServable(f"{error.message} {kept}", code=error.code) from error
    if manifest.merge_only is not None:
        raise NotServable(f"it can be merged into the base, but not served beside it: {manifest.merge_only}. {kept}")
    return manifest


def _copy(directory: Path, copy: Path) -> Path:
    """Of the files that a server would keep: converting replaces them."""
    copy.mkdir()
    for file in directory.iterdir():
        if file.is_file() and is_kept((file.name,)):
            shutil.copy(file, copy)
    return copy


def upload(
    directory: Path, name: str, description: str, server: str, api_key: str | None, max_error: float = 0.0
) -> dict[str, Any]:
    """Send the directory to a running server; the answer names the version. NotServable when the server refuses it."""
    kept = f"; the adapter is kept in {directory}"
    try:
        with Remote(server, api_key) as remote:
            return remote.upload(directory, name, description=description, max_error=max_error)
    except RemoteUnreachable as error:
        raise TrainError(f"{error.message}{kept}, upload it when it is", code=error.code) from error
    except RemoteRefusal as error:
        message = f"{server} answered {error.status}: {error.message}{kept}"
        if error.status in REFUSED and error.status not in NOT_ABOUT_THE_ADAPTER:
            raise NotServable(message) from error
        raise TrainError(message, code="upload_failed") from error
