"""Settings without the caller's environment, a tiny base, a server around the fake engine, and one on a real socket."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from server.launch import ServerProcess, launch
from tests.adapters.factories import write_base
from tests.server.harness import PATIENCE_S, WITH_KEYS, World, upload, world


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("LORAPLEX_") and name != "LORAPLEX_CACHE_DIR"]:
        monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def _logging_is_left_as_it_was() -> Iterator[None]:
    """`serve` sends all logs to standard error: in a test that is a stream which is closed when the test ends."""
    root, handlers = logging.getLogger(), logging.getLogger().handlers[:]
    levels = {name: logging.getLogger(name).level for name in ("", "server", "adapters", "uvicorn.error")}
    yield
    root.handlers[:] = handlers
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


@pytest.fixture
def tiny_base(tmp_path: Path) -> Path:
    return write_base(tmp_path / "tiny")


@pytest.fixture
def built(tiny_base: Path, tmp_path: Path) -> World:
    """Not started, without keys."""
    return world(tiny_base, tmp_path / "data")


@pytest.fixture
def client(built: World) -> Iterator[TestClient]:
    """Of `built`, started and ready."""
    with built.client() as client:
        wait_until_ready(client)
        yield client


@pytest.fixture(scope="session")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """A server that knows the three keys of `harness.KEYS`; for requests that change nothing."""
    root = tmp_path_factory.mktemp("guarded")
    with world(write_base(root / "tiny"), root / "data", **WITH_KEYS).client() as client:
        wait_until_ready(client)
        yield client


@pytest.fixture(scope="session")
def _standing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[World, TestClient]]:
    root = tmp_path_factory.mktemp("standing")
    standing = world(write_base(root / "tiny"), root / "data")
    with standing.client() as client:
        wait_until_ready(client)
        upload(client, "good")
        yield standing, client


@pytest.fixture
def refusing(_standing: tuple[World, TestClient]) -> Iterator[TestClient]:
    """One server for all requests that must change nothing, which is checked after each test. It has `good`."""
    standing, client = _standing
    stored, registered = standing.stored(), standing.services.registry.adapters()
    yield client
    assert standing.stored() == stored
    assert standing.services.registry.adapters() == registered
    assert standing.engine.running == 0


@pytest.fixture(scope="session")
def live_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """`python -m server` with the fake engine, on a real socket."""
    root = tmp_path_factory.mktemp("live")
    flags = ["--engine", "fake", "--model", str(write_base(root / "tiny")), "--data-dir", str(root / "data")]
    with launch(flags, root / "server.log") as server:
        server.wait_ready(PATIENCE_S)
        yield server


def wait_until_ready(client: TestClient) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while client.get("/readyz").status_code != 200:
        assert time.monotonic() < deadline, "the fake engine did not become ready"
        time.sleep(0.005)
