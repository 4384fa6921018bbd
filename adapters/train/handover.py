"""The last stage: a finished adapter goes where it will be served, over HTTP or into a local registry.

It knows the API's upload call and nothing of how the server keeps what it gets.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from adapters.base import BaseModel
from adapters.errors import InvalidAdapter, NotServable, RemoteRefusal, RemoteUnreachable, TrainError
from adapters.remote import Remote
from adapters.validate import validate

REFUSED = range(400, 500)
NOT_ABOUT_THE_ADAPTER = {401, 403, 404, 408, 429}


def check_servable(directory: Path, base: Path, max_rank: int) -> None:
    """The server's own gate, here: what passes is not refused on upload by a server with this base and rank limit."""
    try:
        validate(directory, BaseModel.read(base), max_rank)
    except InvalidAdapter as error:
        raise NotServable(f"{error.message} The adapter is kept in {directory}.", code=error.code) from error


def upload(directory: Path, name: str, description: str, server: str, api_key: str | None) -> dict[str, Any]:
    """Send the directory to a running server; the answer names the version. NotServable when the server refuses it."""
    kept = f"; the adapter is kept in {directory}"
    try:
        with Remote(server, api_key) as remote:
            return remote.upload(directory, name, description=description)
    except RemoteUnreachable as error:
        raise TrainError(f"{error.message}{kept}, upload it when it is", code=error.code) from error
    except RemoteRefusal as error:
        message = f"{server} answered {error.status}: {error.message}{kept}"
        if error.status in REFUSED and error.status not in NOT_ABOUT_THE_ADAPTER:
            raise NotServable(message) from error
        raise TrainError(message, code="upload_failed") from error
