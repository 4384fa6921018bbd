"""A real HTTP server on loopback that answers as a test tells it, and one that speaks as much of the hub's protocol as
its client needs to read a repository."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

COMMIT = "c" * 40


class Answer(NamedTuple):
    status: int
    body: bytes = b""
    headers: Mapping[str, str] = {}


Respond = Callable[[str, Mapping[str, str]], Answer]
"""Path with its query, and the request's headers in lower case. A header of the answer that is empty is left out."""


@dataclass
class WebServer:
    url: str
    asked: list[str] = field(default_factory=list)
    """Every path that was asked for."""
    chunk_bytes: int = 1 << 16
    pause_s: float = 0.0
    """After each chunk of a body."""
    before_chunk: Callable[[str, int], object] = lambda _path, _start: None
    """Called with the path and where in the body it is."""


@contextmanager
def serving(respond: Respond) -> Iterator[WebServer]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            server.asked.append(self.path)
            answer = respond(self.path, {name.lower(): value for name, value in self.headers.items()})
            self.send_response(answer.status)
            for name, value in {"content-length": str(len(answer.body)), **answer.headers}.items():
                if value:
                    self.send_header(name, value)
            self.end_headers()
            try:
                self._send(answer.body if self.command == "GET" else b"")
            except OSError:
                self.close_connection = True  # the reader has left

        do_HEAD = do_GET  # noqa: N815 - http.server chose the name

        def _send(self, body: bytes) -> None:
            for start in range(0, len(body), server.chunk_bytes):
                server.before_chunk(self.path, start)
                self.wfile.write(body[start : start + server.chunk_bytes])
                self.wfile.flush()
                time.sleep(server.pause_s)

        def log_message(self, *_: Any) -> None:
            pass

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listening.daemon_threads = True
    server = WebServer(f"http://127.0.0.1:{listening.server_port}")
    thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        listening.shutdown()
        thread.join()
        listening.server_close()


def files_at(files: Mapping[str, bytes]) -> Respond:
    """What lies under which path; everything else is 404."""

    def respond(path: str, _: Mapping[str, str]) -> Answer:
        content = files.get(path.partition("?")[0])
        return Answer(404) if content is None else Answer(200, content)

    return respond


def hub_of(repositories: Mapping[str, Mapping[str, bytes]], commit: str = COMMIT) -> Respond:
    """`org/name` → its files at the revisions `main` and `commit`. One called `…/gated` is behind a form, and one
    called `…/private` refuses whoever has no token."""
    info = re.compile(r"/api/models/([^/]+/[^/?]+)(?:/revision/([^/?]+))?(?:\?.*)?")
    resolve = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")

    def respond(path: str, headers: Mapping[str, str]) -> Answer:
        asked = info.fullmatch(path) or resolve.fullmatch(path)
        repository = asked[1] if asked else ""
        if repository.endswith("/gated"):
            return _error(403, "GatedRepo")
        if repository not in repositories or (repository.endswith("/private") and "authorization" not in headers):
            return _error(401, "RepoNotFound")
        assert asked is not None
        if asked[2] not in (None, "main", commit):
            return _error(404, "RevisionNotFound")
        files = repositories[repository]
        if asked.re is info:
            return Answer(200, json.dumps(_described(repository, commit, files)).encode())
        if asked[3] not in files:
            return _error(404, "EntryNotFound")
        return _ranged(files[asked[3]], headers.get("range"))

    return respond


def _described(repository: str, commit: str, files: Mapping[str, bytes]) -> dict[str, Any]:
    siblings = [{"rfilename": name, "size": len(content), "blobId": "0" * 40} for name, content in files.items()]
    for sibling, content in zip(siblings, files.values(), strict=True):
        if str(sibling["rfilename"]).endswith((".safetensors", ".bin", ".gz")):
            sha256 = hashlib.sha256(content).hexdigest()
            sibling["lfs"] = {"size": len(content), "sha256": sha256, "pointerSize": 134}
    return {"id": repository, "modelId": repository, "sha": commit, "private": False, "siblings": siblings, "tags": []}


def _ranged(content: bytes, wanted: str | None) -> Answer:
    if wanted is None:
        return Answer(200, content)
    start, _, end = wanted.removeprefix("bytes=").partition("-")
    part = content[int(start) : int(end) + 1 if end else None]
    return Answer(206, part, {"content-range": f"bytes {start}-{int(start) + len(part) - 1}/{len(content)}"})


def _error(status: int, code: str) -> Answer:
    return Answer(status, json.dumps({"error": code}).encode(), {"x-error-code": code, "x-error-message": code})
