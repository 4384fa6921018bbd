"""One file over HTTP, whole or a part: what every download here has in common. Knows no adapters and no exports."""

from __future__ import annotations

import asyncio
import base64
import re
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

from fastapi import Request, Response
from fastapi.responses import FileResponse, StreamingResponse

from adapters import tarball
from server.errors import RangeNotSatisfiable
from server.etags import is_unchanged

RANGE = re.compile(r"bytes=(?:(\d+)-(\d*)|-(\d+))")
"""One part of a file. RFC 9110 lets a server ignore anything else, and answer the whole."""
IMMUTABLE = {"cache-control": "private, no-cache", "x-content-type-options": "nosniff"}
BINARY = "application/octet-stream"


def file_response(request: Request, path: Path, sha256: str) -> Response:
    """Its bytes; a part of them with `Range`, as long as `If-Range` has the same ETag, which is the SHA-256."""
    settle_range(request, path.stat().st_size)
    headers = {"etag": f'"{sha256}"', **checksums(sha256), **IMMUTABLE}
    if is_unchanged(request.headers.get("if-none-match"), headers["etag"]):
        return Response(status_code=304, headers=headers)
    return FileResponse(path, headers=headers, media_type=BINARY)


def tar_response(request: Request, paths: list[Path], name: str, etag: str) -> Response:
    """A tar with the files at its root, the same bytes each time."""
    if is_unchanged(request.headers.get("if-none-match"), f'"{etag}"'):
        return Response(status_code=304, headers={"etag": f'"{etag}"', **IMMUTABLE})
    headers = {
        "content-length": str(tarball.size_bytes(paths)),
        "content-disposition": f'attachment; filename="{name}.tar"',
        "etag": f'"{etag}"',
        **IMMUTABLE,
    }
    return StreamingResponse(_stream(paths), headers=headers, media_type="application/x-tar")


def checksums(sha256: str) -> dict[str, str]:
    """Of the whole file, also where a part is answered: as RFC 9530 has it, and as people read it."""
    encoded = base64.b64encode(bytes.fromhex(sha256)).decode()
    return {"repr-digest": f"sha-256=:{encoded}:", "x-checksum-sha256": sha256}


def settle_range(request: Request, size: int) -> None:
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
