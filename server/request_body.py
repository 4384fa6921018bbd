"""The JSON body of a request, bounded and read whole before anything is done with it."""

from __future__ import annotations

import json
from typing import Any

from fastapi import Request
from starlette.requests import ClientDisconnect

from server.errors import BadRequest, RequestTooLarge


async def read_json(request: Request, max_bytes: int) -> dict[str, Any]:
    """The body as a JSON object. Raises BadRequest, also for one that is too large, before it is read whole."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise BadRequest(f"content-type is {kind!r}, expected application/json", code="unsupported_media_type")
    received = await _read(request, max_bytes)
    try:
        text = received.decode()
        body = json.loads(text)
        if "\\u" in text:
            json.dumps(body, ensure_ascii=False).encode()  # half a surrogate pair is JSON, but no text
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the body is not JSON in UTF-8: {error}", code="invalid_json") from None
    if not isinstance(body, dict):
        raise BadRequest(f"the body is a JSON {type(body).__name__}, expected an object", code="invalid_json")
    return body


async def _read(request: Request, max_bytes: int) -> bytes:
    received = bytearray()
    try:
        async for chunk in request.stream():
            received += chunk
            if len(received) > max_bytes:
                raise RequestTooLarge(f"the body is larger than {max_bytes} bytes (max_request_bytes)")
    except ClientDisconnect:
        raise BadRequest("the client went away", code="client_disconnected") from None
    return bytes(received)
