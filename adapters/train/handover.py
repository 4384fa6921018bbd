"""The last stage: a finished adapter goes where it will be served, over HTTP or into a local registry.

It knows the API's upload call and nothing of how the server keeps what it gets.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx

from adapters.base import BaseModel
from adapters.errors import InvalidAdapter, NotServable, TrainError
from adapters.validate import validate

REFUSED = range(400, 500)
NOT_ABOUT_THE_ADAPTER = {401, 403, 404, 408, 429}
TIMEOUT_S = 120.0


def check_servable(directory: Path, base: Path, max_rank: int) -> None:
    """The server's own gate, here: what passes is not refused on upload by a server with this base and rank limit."""
    try:
        validate(directory, BaseModel.read(base), max_rank)
    except InvalidAdapter as error:
        raise NotServable(f"{error.message} The adapter is kept in {directory}.", code=error.code) from error


def upload(directory: Path, name: str, description: str, server: str, api_key: str | None) -> dict[str, Any]:
    """POST the directory to a running server; the answer names the version. NotServable when the server refuses it."""
    url = f"{server.rstrip('/')}/v1/adapters"
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    form = {"name": name, "description": description}
    with ExitStack() as opened:
        parts = [
            ("files", (path.name, opened.enter_context(path.open("rb"))))
            for path in sorted(directory.iterdir())
            if path.is_file()
        ]
        try:
            response = httpx.post(url, data=form, files=parts, headers=headers, timeout=TIMEOUT_S)
        except httpx.HTTPError as error:
            raise TrainError(
                f"{url} did not answer ({error}); the adapter is kept in {directory}, upload it when the server is up",
                code="server_unreachable",
            ) from error
    if response.status_code not in (200, 201):
        raise _refusal(response, directory)
    return dict(response.json())


def _refusal(response: httpx.Response, directory: Path) -> TrainError:
    status = response.status_code
    message = f"{response.url} answered {status}: {_reason(response)}; the adapter is kept in {directory}"
    if status in REFUSED and status not in NOT_ABOUT_THE_ADAPTER:
        return NotServable(message)
    return TrainError(message, code="upload_failed")


def _reason(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return response.text[:200]
