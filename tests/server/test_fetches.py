"""A server whose adapter files are in a bucket: they come to its disk before the engine needs them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapters.errors import StoreUnreachable
from server.cli import main
from tests.server.harness import Exchange, World, chat, ingest, said, until, upload, world

CHAT = "/v1/chat/completions"


@pytest.fixture
def database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if getattr(request, "param", "sqlite") == "sqlite":
        return f"sqlite:///{tmp_path}/registry.db"
    fresh: str = request.getfixturevalue("postgres")()
    return fresh


@pytest.fixture
def machine(s3: Callable[[], str], database: str, tiny_base: Path, tmp_path: Path) -> Callable[[str], World]:
    """A server with a disk of its own; they share bucket and registry."""
    shared: dict[str, Any] = {"store_url": s3(), "database_url": database}
    return lambda name: world(tiny_base, tmp_path / name, **shared)


def copies(built: World) -> list[str]:
    return [path.name for path in (built.settings.data_dir / "copies" / "blobs").iterdir()]


@pytest.mark.parametrize("database", ["sqlite", "postgres"], indirect=True)
def test_what_one_server_takes_in_another_serves(machine: Callable[[str], World]) -> None:
    first, second = machine("first"), machine("second")
    with first.client() as client:
        version = upload(client, "a")
    assert not (first.settings.data_dir / "adapters").exists()
    with second.client() as client:
        assert copies(second) == []
        answer = client.post(CHAT, json=chat("a"))
        assert "a@" in said(answer.json())
        assert copies(second) == [version["digest"].removeprefix("sha256:")]
        assert client.delete("/v1/adapters/a").json()["deleted"]
    assert copies(second) == []


async def test_one_fetch_for_all_who_wait_and_it_outlives_the_first(
    machine: Callable[[str], World], monkeypatch: pytest.MonkeyPatch
) -> None:
    ingest(machine("first"), "a")
    second = machine("second")
    started, go = asyncio.Event(), threading.Event()
    loop, path, fetched = asyncio.get_running_loop(), second.services.store.path, []

    def slow(digest: str) -> Path:
        fetched.append(digest)
        loop.call_soon_threadsafe(started.set)
        go.wait(10)
        return path(digest)

    monkeypatch.setattr(second.services.store, "path", slow)
    async with second.running():
        leaving, staying = (Exchange(second.app, CHAT, chat("a")) for _ in range(2))
        first_task = leaving.start()
        await started.wait()
        second_task = staying.start()
        base = Exchange(second.app, CHAT, chat())
        await base.start()
        assert base.status == 200
        leaving.leave()
        await first_task
        assert not second_task.done()
        go.set()
        await second_task
        assert staying.status == 200
        assert len(fetched) == 1
        await until(lambda: second.engine.running == 0)


def test_files_that_are_gone_are_an_error_that_says_so(machine: Callable[[str], World]) -> None:
    first, second = machine("first"), machine("second")
    version = first.services.registry.resolve(ingest(first, "a").partition("@")[0])
    first.services.store.delete(version.digest)
    with second.client() as client:
        response = client.post(CHAT, json=chat("a"))
        assert response.status_code == 500
        assert response.json()["error"]["code"] == "store_error"
        assert "missing in s3://" in response.json()["error"]["message"]


@pytest.mark.usefixtures("s3")
def test_a_bucket_that_is_not_there_stops_the_start(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(StoreUnreachable):
        world(tiny_base, tmp_path / "data", store_url="s3://no-such-bucket")
    flags = ["--engine", "fake", "--port", "0", "--model", str(tiny_base), "--data-dir", str(tmp_path / "data")]
    assert main(["serve", *flags, "--store-url", "s3://no-such-bucket"]) == 2
    assert "check store_url" in capsys.readouterr().err
