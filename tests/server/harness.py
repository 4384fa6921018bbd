"""A whole server around the fake engine, and three ways to speak to it: in a thread, in this loop, over a socket."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.testclient import TestClient
from starlette.types import Message

from server.app import create_app
from server.engine.fake import FakeEngine
from server.services import Services
from server.settings import Settings
from tests.adapters.factories import AdapterFiles, lora_tensors

LOCAL = "http://127.0.0.1"
KEYS = {"infer": "key-that-may-infer", "publish": "key-that-may-publish", "admin": "key-that-may-admin"}
PATIENCE_S = 120.0
"""How long a test waits for what should take a moment. Only one that fails waits so long."""
WITH_KEYS: dict[str, Any] = {"api_keys": tuple(f"{scope}:{secret}" for scope, secret in KEYS.items())}


@dataclass
class World:
    """One server: its settings, its application and every engine it has built so far."""

    settings: Settings
    token_s: float = 0.0
    load_s: float = 0.0
    engines: list[FakeEngine] = field(default_factory=list)
    merged: list[FakeEngine] = field(default_factory=list)
    """Engines of merged weights, built so far."""

    def __post_init__(self) -> None:
        self.app = create_app(self.settings, build_engine=self._build, make_merged=self._merged_engine)

    def _build(self) -> FakeEngine:
        capacity = self.settings.resident_adapters + 1
        self.engines.append(FakeEngine("tiny", capacity=capacity, token_s=self.token_s, load_s=self.load_s))
        return self.engines[-1]

    def _merged_engine(self, name: str, path: Path) -> FakeEngine:
        return self._make_merged(name, path)

    def _make_merged(self, name: str, _: Path) -> FakeEngine:
        self.merged.append(FakeEngine(name, token_s=self.token_s))
        return self.merged[-1]

    @property
    def engine(self) -> FakeEngine:
        return self.engines[-1]

    @property
    def services(self) -> Services:
        services: Services = self.app.state.services
        return services

    def client(self) -> TestClient:
        return TestClient(self.app, base_url=LOCAL, raise_server_exceptions=False)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[World]:
        """Started in this event loop, and ready."""
        async with self.app.router.lifespan_context(self.app):
            await self.services.pool.ready()
            yield self

    def stored(self) -> dict[str, bytes]:
        """Every file of the blob store, staging included."""
        root = self.settings.data_dir / "adapters"
        return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def world(base: Path, data_dir: Path, *, token_s: float = 0.0, load_s: float = 0.0, **changes: Any) -> World:
    """Adapters are not tried before they serve, or every test would begin with them loaded."""
    chosen = {"model": str(base), "data_dir": data_dir, "probe_uploads": False, **changes}
    return World(Settings(**chosen), token_s, load_s)


def adapter_files(seed: int = 0) -> AdapterFiles:
    """Another seed, another digest."""
    return AdapterFiles(tensors=lora_tensors(seed=seed))


def as_parts(files: Mapping[str, bytes]) -> list[tuple[str, tuple[str, bytes]]]:
    return [("files", (name, content)) for name, content in files.items()]


def upload(client: TestClient, name: str, seed: int = 0, **fields: str) -> dict[str, Any]:
    """Upload a good adapter and return what the server says of it."""
    parts = as_parts(adapter_files(seed).files())
    response = client.post("/v1/adapters", data={"name": name, **fields}, files=parts)
    assert response.status_code in (200, 201), response.text
    return dict(response.json())


def ingest(built: World, name: str, seed: int = 0) -> str:
    """The same past HTTP; returns the name under which the engine sees it."""
    version, _ = built.services.ingest.upload(name, adapter_files(seed).uploads())
    return f"{name}@{version.digest.removeprefix('sha256:')[:12]}"


def chat(model: str | None = None, prompt: str = "one two three", **more: Any) -> dict[str, Any]:
    named = {} if model is None else {"model": model}
    return {"messages": [{"role": "user", "content": prompt}], **named, **more}


def said(answer: Mapping[str, Any]) -> str:
    """The text of a whole chat answer."""
    return str(answer["choices"][0]["message"]["content"])


def events(text: str) -> list[Any]:
    """The data of server-sent events, decoded; `[DONE]` stays a string."""
    found = [line.removeprefix("data: ") for line in text.split("\n") if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in found]


class Exchange:
    """One request spoken to the application in this event loop, so that a test decides when the client leaves."""

    def __init__(self, app: FastAPI, path: str, body: Mapping[str, Any], method: str = "POST") -> None:
        self._app = app
        self._scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path.partition("?")[0],
            "raw_path": path.partition("?")[0].encode(),
            "query_string": path.partition("?")[2].encode(),
            "root_path": "",
            "headers": [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
        }
        self._incoming: asyncio.Queue[Message] = asyncio.Queue()
        self._incoming.put_nowait({"type": "http.request", "body": json.dumps(body).encode(), "more_body": False})
        self._heard: asyncio.Queue[Message] = asyncio.Queue()
        self.messages: list[Message] = []

    def start(self) -> asyncio.Task[None]:
        return asyncio.ensure_future(self._app(self._scope, self._incoming.get, self._hear))

    def leave(self) -> None:
        for _ in range(4):  # whoever listens, now or later, hears it
            self._incoming.put_nowait({"type": "http.disconnect"})

    async def heard(self) -> Message:
        """The next message of the application."""
        return await self._heard.get()

    async def _hear(self, message: Message) -> None:
        self.messages.append(message)
        self._heard.put_nowait(message)

    @property
    def status(self) -> int:
        return int(self.messages[0]["status"])

    @property
    def text(self) -> str:
        return b"".join(message.get("body", b"") for message in self.messages).decode()


def until_let_go(client: TestClient, job_id: str) -> None:
    """Until the server has counted and cleared up behind a job that has ended: a moment after that shows."""
    runner, deadline = client.app.state.services.runner, time.monotonic() + PATIENCE_S  # type: ignore[attr-defined]
    while any(run.job.id == job_id for run in list(runner._running.values())):
        assert time.monotonic() < deadline, job_id
        time.sleep(0.005)


async def until(condition: Any, timeout_s: float = PATIENCE_S) -> None:
    """Wait for a condition that another task makes true."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - nobody sets an event for a test
            await asyncio.sleep(0.005)
