"""Before a version serves, the engine tries it: what it finds is kept, what it does not take is refused."""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from adapters.errors import InvalidAdapter, NotFound, RemoteRefusal
from adapters.records import Version
from adapters.remote import Remote
from adapters.upload import UploadOptions
from server.adapters_cli.tables import print_version
from server.engine.fake import FakeEngine, Fault
from server.engine.protocol import AdapterHandle
from server.errors import AdapterUnavailable
from tests.adapters.factories import AdapterFiles, lora_tensors, tensor
from tests.server.conftest import wait_until_ready
from tests.server.harness import PATIENCE_S, World, adapter_files, as_parts, until, world


@pytest.fixture
def probing(tiny_base: Path, tmp_path: Path) -> World:
    return world(tiny_base, tmp_path / "data", probe_uploads=True)


@pytest.fixture
async def running(probing: World) -> AsyncIterator[World]:
    async with probing.running():
        yield probing


def zeros() -> AdapterFiles:
    return AdapterFiles(
        tensors={
            name: tensor(np.zeros(each.shape)) if "lora_B" in name else each for name, each in lora_tensors().items()
        }
    )


async def admitted(running: World, name: str, files: AdapterFiles | None = None, **options: Any) -> Version:
    uploads = (files or adapter_files()).uploads()
    version, _ = await running.services.admission.upload(name, uploads, UploadOptions(**options))
    return version


def faulty(fault: Fault, name: str = "bad") -> Callable[[AdapterHandle], Fault | None]:
    return lambda handle: fault if handle.name.startswith(name) else None


async def test_what_it_changes_is_kept_with_the_version(running: World) -> None:
    version = await admitted(running, "a")
    assert version.state == "ready"
    assert version.probe is not None
    assert (version.probe["mean_change"], version.probe["largest_change"]) == (0.5, 0.5)
    assert version.probe["tokens"] > 10
    assert version.probe["warning"] is None
    assert version.pending is None
    assert running.services.registry.adapter("a").aliases == {"default": 1}
    assert running.engine.running == 0
    assert list(running.services.residency.snapshot()) == [f"a@{version.digest[7:19]}"]  # warm for the first request


async def test_one_that_changes_nothing_is_flagged(running: World) -> None:
    version = await admitted(running, "a", zeros())
    assert version.state == "ready"
    assert version.probe is not None
    assert version.probe["largest_change"] == 0
    assert "as the base does" in version.probe["warning"]


@pytest.mark.parametrize(("fault", "says"), [("refused", "does not take it"), ("nan", "not finite")])
async def test_what_the_engine_does_not_take_is_refused_and_leaves_nothing(
    running: World, fault: Fault, says: str
) -> None:
    await admitted(running, "good", adapter_files(1))
    stored = running.stored()
    running.engine.fault = faulty(fault)
    with pytest.raises(InvalidAdapter, match=says) as refused:
        await admitted(running, "bad")
    assert refused.value.code == "probe_failed"
    assert running.stored() == stored
    assert [adapter.name for adapter in running.services.registry.adapters()] == ["good"]


async def test_a_bad_second_version_leaves_the_first_in_service(running: World) -> None:
    await admitted(running, "a")
    running.engine.fault = lambda handle: "nan" if handle.name != running.engine.loads[0] else None
    with pytest.raises(InvalidAdapter):
        await admitted(running, "a", adapter_files(1))
    adapter = running.services.registry.adapter("a")
    assert (adapter.aliases, [version.number for version in adapter.versions]) == ({"default": 1}, [1])
    running.engine.fault = lambda handle: None
    assert (await admitted(running, "a", adapter_files(1))).number == 3  # a number is never given out twice


async def test_while_it_is_tried_nobody_is_answered_with_it(probing: World) -> None:
    async with probing.running():
        probing.engine.pause(loads=True)
        upload = asyncio.create_task(admitted(probing, "a"))
        await until(lambda: probing.services.registry.checking())
        with pytest.raises(AdapterUnavailable) as busy:
            await asyncio.to_thread(probing.services.generator._resolver.resolve, "a@1")
        assert busy.value.code == "adapter_checking"
        assert probing.services.registry.adapter("a").aliases == {}
        probing.engine.go_on()
        assert (await upload).state == "ready"


async def test_the_client_need_not_wait_for_it(probing: World) -> None:
    async with probing.running():
        probing.engine.pause(loads=True)
        files = adapter_files().uploads()
        version, _ = await probing.services.admission.upload("a", files, UploadOptions(), wait_s=0)
        assert version.state == "checking"
        probing.engine.go_on()
        await until(lambda: probing.services.registry.resolve("a", "1").state == "ready")
        assert probing.services.registry.adapter("a").aliases == {"default": 1}


async def test_one_that_fails_when_nobody_waits_stays_and_says_why(probing: World) -> None:
    async with probing.running():
        probing.engine.pause(loads=True)
        probing.engine.fault = faulty("nan")
        files = adapter_files().uploads()
        await probing.services.admission.upload("bad", files, UploadOptions(), wait_s=0)
        probing.engine.go_on()
        await until(lambda: probing.services.registry.resolve("bad", "1").state == "failed")
        failed = probing.services.registry.resolve("bad", "1")
        assert "not finite" in str(failed.reason)
        assert probing.services.registry.adapter("bad").aliases == {}
        probing.engine.fault = lambda handle: None
        assert (await admitted(probing, "bad")).state == "ready"  # the same bytes again: another try


async def test_one_that_is_uploaded_again_while_its_failed_trial_ends_is_tried_again(
    running: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry, may_end = running.services.registry, threading.Event()
    reject = registry.reject

    def reject_slowly(version: Version, reason: str) -> None:
        reject(version, reason)
        may_end.wait(PATIENCE_S)

    monkeypatch.setattr(registry, "reject", reject_slowly)
    running.engine.fault = faulty("nan")
    running.engine.pause(loads=True)
    await running.services.admission.upload("bad", adapter_files().uploads(), UploadOptions(), wait_s=0)
    running.engine.go_on()
    await until(lambda: registry.resolve("bad", "1").state == "failed")
    running.engine.fault = lambda handle: None
    again = asyncio.create_task(admitted(running, "bad"))
    await until(lambda: registry.resolve("bad", "1").state == "checking")
    may_end.set()
    assert (await again).state == "ready"


async def test_it_is_tried_when_the_engine_is_there(tiny_base: Path, tmp_path: Path) -> None:
    """Uploaded to a server that stops before it could be tried: the next start tries it."""
    first = world(tiny_base, tmp_path / "data", probe_uploads=True)
    first.services.ingest.upload("a", adapter_files().uploads(), UploadOptions(probe=True, promote=True, by="me"))
    assert first.services.registry.resolve("a", "1").state == "checking"
    first.services.registry.close()
    second = world(tiny_base, tmp_path / "data", probe_uploads=True)
    async with second.running():
        await until(lambda: second.services.registry.resolve("a", "1").state == "ready")
        (move,) = second.services.registry.moves("a", "default")
        assert (move.new, move.by) == ({1: 1}, "me")


async def test_where_nothing_is_tried_any_more_it_serves(tiny_base: Path, tmp_path: Path) -> None:
    first = world(tiny_base, tmp_path / "data", probe_uploads=True)
    first.services.ingest.upload("a", adapter_files().uploads(), UploadOptions(probe=True))
    first.services.registry.close()
    second = world(tiny_base, tmp_path / "data", probe_uploads=False)
    async with second.running():
        assert second.services.registry.adapter("a").aliases == {"default": 1}


async def test_one_that_takes_the_engine_down_is_given_up_after_a_few_tries(
    probing: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.engine.pool.WATCH_S", 0.01)
    monkeypatch.setattr("server.engine.pool.FIRST_RETRY_S", 0.01)
    monkeypatch.setattr("server.admission.FIRST_PAUSE_S", 0.01)
    build = probing._build

    def faulty_engine() -> FakeEngine:
        engine = build()
        engine.fault = faulty("death")
        return engine

    probing.services.pool._build = faulty_engine
    async with probing.running():
        await admitted(probing, "good", adapter_files(1))
        with pytest.raises(InvalidAdapter, match="3 times"):
            await admitted(probing, "bad")
        assert len(probing.engines) == 4
        await probing.services.pool.ready()
        with pytest.raises(NotFound):
            probing.services.registry.adapter("bad")


async def test_an_overtaken_upload_does_not_take_the_alias_back(running: World) -> None:
    registry = running.services.registry
    for seed in (1, 2):
        running.services.ingest.upload("a", adapter_files(seed).uploads(), UploadOptions(probe=True))
    one, two = (registry.resolve("a", ref) for ref in ("1", "2"))
    assert registry.admit(two, {"mean_change": 1.0})
    assert registry.admit(one, {"mean_change": 1.0})
    assert registry.adapter("a").aliases == {"default": 2}
    assert not registry.admit(one, {})  # once only


async def test_a_version_that_is_deleted_while_it_is_tried_is_gone(probing: World) -> None:
    async with probing.running():
        probing.engine.pause(loads=True)
        files = adapter_files().uploads()
        version, _ = await probing.services.admission.upload("a", files, UploadOptions(), wait_s=0)
        deletion = await probing.services.lifecycle.delete(version)
        probing.engine.go_on()
        await deletion
        with pytest.raises(NotFound):
            probing.services.registry.adapter("a")
        await until(lambda: not probing.services.admission._trials)
        assert probing.services.residency.snapshot() == {}


def test_over_http(probing: World) -> None:
    with probing.client() as client:
        shown = client.post("/v1/adapters", data={"name": "a"}, files=as_parts(adapter_files().files()))
        assert shown.status_code == 201, shown.text
        assert shown.json()["probe"]["mean_change"] == 0.5
        probing.engine.fault = faulty("nan")
        refused = client.post("/v1/adapters", data={"name": "bad"}, files=as_parts(adapter_files(1).files()))
        assert (refused.status_code, refused.json()["error"]["code"]) == (422, "probe_failed")
        assert client.get("/v1/adapters/bad").status_code == 404


def test_the_command_line_shows_what_was_found(probing: World) -> None:
    with probing.client() as client:
        for name, files in (("strong", adapter_files()), ("idle", zeros())):
            client.post("/v1/adapters", data={"name": name}, files=as_parts(files.files()))
        said = {name: printed(client.get(f"/v1/adapters/{name}/versions/1").json()) for name in ("strong", "idle")}
    assert "|Δ log-probability| 0.5 on average, 0.5 at most" in said["strong"]
    assert "it answers as the base does" not in said["strong"]
    assert "it answers as the base does" in said["idle"]


def printed(version: dict[str, Any]) -> str:
    console = Console(file=io.StringIO(), width=200)
    print_version(version, console)
    return str(console.file.getvalue())  # type: ignore[attr-defined]


@pytest.mark.parametrize("fault", [None, "nan"])
def test_a_push_waits_until_it_was_tried(
    probing: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Fault | None
) -> None:
    monkeypatch.setattr("server.admission.WAIT_S", 0)
    monkeypatch.setattr("adapters.remote.TRIAL_POLL_S", 0.01)
    path = adapter_files().write(tmp_path / "bad")
    with probing.client() as client, Remote("http://127.0.0.1") as remote:
        remote._client.close()
        remote._client = client  # type: ignore[assignment]
        wait_until_ready(client)
        probing.engine.fault = lambda handle: fault
        probing.engine.pause(loads=True)
        look, portal = remote.version, client.portal
        assert portal is not None

        def look_and_go_on(name: str, ref: str) -> dict[str, Any]:
            found = look(name, ref)
            portal.call(probing.engine.go_on)
            return found

        monkeypatch.setattr(remote, "version", look_and_go_on)
        if fault is None:
            assert remote.upload(path, "a")["aliases"] == ["default"]
        else:
            with pytest.raises(RemoteRefusal, match="not finite") as refused:
                remote.upload(path, "a")
            assert refused.value.code == "probe_failed"
            assert client.get("/v1/adapters/a").json()["versions"][0]["state"] == "failed"
