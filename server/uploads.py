"""A multipart request → fields and files on disk, never more than the limit, whatever the headers claim."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from fastapi import Request
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from adapters.errors import UploadError, UploadTooLarge
from adapters.upload import UploadedFile, UploadLimits

FRAMING_BYTES = 1 << 20
"""What boundaries, part headers and text fields may add to the files."""


@dataclass(frozen=True)
class Upload:
    fields: dict[str, str]
    files: list[UploadedFile]


@asynccontextmanager
async def receive(request: Request, limits: UploadLimits) -> AsyncIterator[Upload]:
    """Read the request into temporary files, which are gone when the block ends.

    Raises UploadTooLarge before reading when the declared length says so, and while reading otherwise.
    """
    form = await _parse(request, limits)
    try:
        fields = {name: value for name, value in form.multi_items() if isinstance(value, str)}
        parts = [part for _, part in form.multi_items() if isinstance(part, UploadFile)]
        yield Upload(fields, [UploadedFile(part.filename or "", part.file) for part in parts])
    finally:
        await form.close()


def media_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def _parse(request: Request, limits: UploadLimits) -> FormData:
    kind = media_type(request)
    if kind != "multipart/form-data":
        raise UploadError(
            f"content-type is {kind!r}, expected multipart/form-data with the field `name` and the files, "
            "or application/json with `name` and `source`",
            code="unsupported_media_type",
        )
    stream = _until_limit(request, limits.max_bytes + FRAMING_BYTES, lambda: parser.ended)
    parser = _Parser(request.headers, stream, max_files=limits.max_files, max_fields=16)
    try:
        return await parser.parse()
    except (MultiPartException, KeyError) as error:
        raise UploadError(f"the multipart body cannot be read: {error}", code="bad_multipart") from None


class _Parser(MultiPartParser):
    """Notes whether the closing boundary was seen; starlette takes what came before it for the whole form."""

    ended = False

    def on_end(self) -> None:
        self.ended = True


async def _until_limit(request: Request, limit: int, ended: Callable[[], bool]) -> AsyncGenerator[bytes, None]:
    """The body's chunks. Raising in here makes the parser close its files."""
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise UploadTooLarge(f"the upload declares {declared} bytes, the limit is {limit} (max_upload_bytes)")
    received = 0
    try:
        async for chunk in request.stream():
            received += len(chunk)
            if received > limit:
                raise UploadTooLarge(f"the upload is larger than the limit of {limit} bytes (max_upload_bytes)")
            yield chunk
    except ClientDisconnect:
        raise UploadError("the client went away", code="client_disconnected") from None
    if not ended():
        raise UploadError(
            f"the multipart body ends after {received} bytes without its closing boundary; send it whole",
            code="bad_multipart",
        )
