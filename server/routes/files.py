"""A version's files over HTTP: list, one of them, all as one tar. It takes `publish`: they are somebody's weights."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import FileResponse, StreamingResponse

from adapters import tarball
from adapters.errors import NotFound
from adapters.registry import Version
from server.auth import require
from server.errors import RangeNotSatisfiable
from server.etags import is_unchanged
from server.routes.shapes import file_json
from server.services import Services, Wired

router = APIRouter(prefix="/v1/adapters", tags=["adapters"], dependencies=[Depends(require("publish"))])
RANGE = re.compile(r"bytes=(?:(\d+)-(\d*)|-(\d+))")
"""One part of a file. RFC 9110 lets a server ignore anything else, and answer the whole."""
IMMUTABLE = {"cache-control": "private, no-cache", "x-content-type-options": "nosniff"}
BINARY = "application/octet-stream"


@router.get("/{name}/versions/{ref}/files")
async def list_files(name: str, ref: str, wired: Wired) -> dict[str, Any]:
    version, paths = await _files(wired, name, ref)
    data = [file_json(version, path) for path in paths]
    return {"object": "list", "version": version.number, "digest": version.digest, "data": data}


@router.get("/{name}/versions/{ref}/files/{file}")
async def get_file(name: str, ref: str, file: str, wired: Wired, request: Request) -> Response:
    """Its bytes; a part of them with `Range`. The ETag is the file's SHA-256."""
    version, paths = await _files(wired, name, ref)
    found = {path.name: path for path in paths}
    if file not in found:
        raise NotFound(f"{version.ref} has no file {file[:140]!r}; it has {', '.join(sorted(found))}")
    _settle_range(request, found[file].stat().st_size)
    headers = {"etag": f'"{version.manifest.files[file]}"', **IMMUTABLE}
    if is_unchanged(request.headers.get("if-none-match"), headers["etag"]):
        return Response(status_code=304, headers=headers)
    return FileResponse(found[file], headers=headers, media_type=BINARY)


@router.get("/{name}/versions/{ref}/archive")
async def get_archive(name: str, ref: str, wired: Wired, request: Request) -> Response:
    """A tar with the files at its root, the same bytes each time; an upload takes it as it is."""
    version, paths = await _files(wired, name, ref)
    if is_unchanged(request.headers.get("if-none-match"), f'"{version.digest}"'):
        return Response(status_code=304, headers={"etag": f'"{version.digest}"', **IMMUTABLE})
    headers = {
        "content-length": str(tarball.size_bytes(paths)),
        "content-disposition": f'attachment; filename="{version.adapter}-{version.number}.tar"',
        "etag": f'"{version.digest}"',
        **IMMUTABLE,
    }
    return StreamingResponse(_stream(paths), headers=headers, media_type="application/x-tar")


async def _files(wired: Services, name: str, ref: str) -> tuple[Version, list[Path]]:
    """Those that the manifest lists, on this machine."""
    version = await asyncio.to_thread(wired.registry.resolve, name, ref)
    directory = await wired.fetches.path(version.digest)
    return version, sorted(directory / file for file in version.manifest.files)


def _settle_range(request: Request, size: int) -> None:
    """Starlette answers a range that it cannot read in plain text."""
    asked = RANGE.fullmatch(request.headers.get("range", "").strip())
    if asked is None or (asked[2] and int(asked[2]) < int(asked[1])):
        request.scope["headers"] = [pair for pair in request.scope["headers"] if pair[0] != b"range"]
    elif (asked[1] and int(asked[1]) >= size) or (asked[3] and int(asked[3]) == 0):
        raise RangeNotSatisfiable(f"the range {asked[0][:80]!r} lies outside the file, which has {size} bytes")


async def _stream(paths: list[Path]) -> AsyncIterator[bytes]:
    made = tarball.pieces(paths)
    try:
        while (piece := await asyncio.to_thread(next, made, None)) is not None:
            yield piece
    finally:
        with suppress(ValueError):  # a thread is reading just now; then it ends when that does
            made.close()
