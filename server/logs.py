"""JSON logs on standard error, and the outermost ASGI layer: request ids, access lines, the last catch."""

from __future__ import annotations

import json
import logging
import re
import sys
import time
import uuid
from contextvars import ContextVar
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server import problems

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
access = logging.getLogger("server.access")
log = logging.getLogger(__name__)

SAFE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
STANDARD = set(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}
# uvicorn repeats its message in colour; vLLM's record factory stamps every record once it is imported.
NOISE = {"color_message", "vllm_process_name"}


class JsonFormatter(logging.Formatter):
    """One object a line: time, level, logger, message, request_id, everything given as `extra`, traceback."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if (current := request_id.get()) is not None:
            entry["request_id"] = current
        entry |= {name: value for name, value in record.__dict__.items() if name not in STANDARD | NOISE}
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str, ensure_ascii=False)


def configure(level: str) -> None:
    """Send everything, uvicorn's and the libraries' lines too, through one JSON handler."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for name in ("server", "adapters", "uvicorn.error"):
        logging.getLogger(name).setLevel(level.upper())


class Edge:
    """Takes a sane `x-request-id` from the client or makes one, for every response and every log line; turns what
    nobody caught into the one error body."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        identifier = _given(scope) or uuid.uuid4().hex
        token, started, status = request_id.set(identifier), time.perf_counter(), 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", identifier.encode())]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            log.exception("unhandled error")
            if status:
                raise
            await problems.response(error)(scope, receive, send_with_id)
        finally:
            access.info("request", extra=_line(scope, status, started))
            request_id.reset(token)


def _given(scope: Scope) -> str | None:
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            text = value.decode("latin-1")
            return text if SAFE_ID.fullmatch(text) else None
    return None


def _line(scope: Scope, status: int, started: float) -> dict[str, Any]:
    seconds = round(time.perf_counter() - started, 4)
    return {"method": scope["method"], "path": scope["path"], "status": status, "seconds": seconds}
