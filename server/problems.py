"""The one error body, and the one table from error class to HTTP status.

Every failure leaves as OpenAI's `{"error": {"message", "type", "param", "code"}}`, also in mid-stream.
"""

from __future__ import annotations

import json
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from adapters import errors as artifact
from server import errors

STATUS: dict[type[Exception], int] = {
    errors.ServerError: 500,
    errors.BadRequest: 400,
    errors.RequestTooLarge: 413,
    errors.RangeNotSatisfiable: 416,
    errors.AuthenticationFailed: 401,
    errors.PermissionDenied: 403,
    errors.ModelNotFound: 404,
    errors.AdapterUnavailable: 409,
    errors.MergedEngineRefused: 409,
    errors.Overloaded: 429,
    errors.InsufficientStorage: 507,
    errors.EngineUnavailable: 503,
    errors.CorruptedOutput: 500,
    artifact.AdapterError: 500,
    artifact.UploadError: 400,
    artifact.UploadTooLarge: 413,
    artifact.ChecksumMismatch: 400,
    artifact.SourceError: 400,
    artifact.SourceRefused: 403,
    artifact.SourceNotFound: 404,
    artifact.SourceForbidden: 403,
    artifact.SourceUnavailable: 502,
    artifact.UnsafeArchive: 400,
    artifact.InvalidAdapter: 422,
    artifact.NotFound: 404,
    artifact.Conflict: 409,
    artifact.JobCancelled: 409,
    artifact.JobPaused: 409,
    artifact.JobLost: 409,
    artifact.Changed: 412,
    artifact.StoreError: 500,
    artifact.StoreUnreachable: 503,
    artifact.RemoteError: 502,
    artifact.RemoteUnreachable: 502,
    artifact.RemoteRefusal: 502,
    artifact.MergeError: 400,
    artifact.NotMergeable: 422,
    artifact.Unfaithful: 422,
    artifact.ExportError: 400,
    artifact.NotExportable: 422,
    artifact.NotTheSame: 422,
    artifact.TrainError: 500,
    artifact.ConfigError: 400,
    artifact.DataError: 400,
    artifact.WouldNotFit: 422,
    artifact.Diverged: 422,
    artifact.RunStopped: 409,
    artifact.NotServable: 422,
}
TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def body(status: int, message: str, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """OpenAI's error object for an HTTP status."""
    default = "server_error" if status >= 500 else "invalid_request_error"
    message = message.encode(errors="backslashreplace").decode()  # a lone surrogate from a stranger's JSON has no bytes
    return {"error": {"message": message, "type": TYPES.get(status, default), "param": param, "code": code}}


def status_of(error: Exception) -> int:
    return STATUS.get(type(error), 500)


def told(error: Exception) -> tuple[int, str, str]:
    """Status, message and code of any error of the two trees; of anything else nothing of its inside."""
    status = STATUS.get(type(error))
    if status is None:
        return 500, "internal error; the server's log has the details", "internal_error"
    code: str = getattr(error, "code", "")
    return status, str(error), code


def response(error: Exception) -> JSONResponse:
    """The response to any error."""
    status, message, code = told(error)
    retry_after_s = getattr(error, "retry_after_s", None)
    headers = {} if retry_after_s is None else {"retry-after": str(retry_after_s)}
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(body(status, message, param=getattr(error, "param", None), code=code), status, headers)


def event(status: int, message: str, *, param: str | None = None, code: str | None = None) -> str:
    """The same body as a server-sent event, for an error after the first byte."""
    return f"data: {json.dumps(body(status, message, param=param, code=code))}\n\n"


def install(app: FastAPI) -> None:
    """Make every failure of `app` leave in the one body."""
    app.add_exception_handler(errors.ServerError, _known)
    app.add_exception_handler(artifact.AdapterError, _known)
    app.add_exception_handler(HTTPException, _framework)
    app.add_exception_handler(RequestValidationError, _validation)


async def _known(_: Request, error: Exception) -> JSONResponse:
    return response(error)


async def _framework(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    codes = {404: "unknown_url", 405: "method_not_allowed"}
    content = body(error.status_code, str(error.detail), code=codes.get(error.status_code))
    return JSONResponse(content, error.status_code, dict(error.headers or {}))


async def _validation(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"][1:]) or str(first["loc"][0])
    return JSONResponse(body(400, f"{where}: {first['msg']}", param=where, code="bad_request"), 400)
