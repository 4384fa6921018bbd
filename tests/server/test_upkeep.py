"""Garbage collection and verification of a running server."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from adapters.errors import Conflict
from adapters.registry import Registry
from tests.server.harness import PATIENCE_S, Exchange, World, adapter_files, chat, events, ingest, until, upload, world

CHAT = "/v1/chat/completions"


def stock(client: TestClient, name: str, count: int) -> None:
    for seed in range(1, count + 1):
        upload(client, name, seed)


def gc(client: TestClient, **asked: Any) -> tuple[list[str], dict[str, str]]:
    answer = client.post("/v1/adapters/gc", json=asked)
    assert answer.status_code == 200, answer.text
    assert answer.json()["done"]
    deleted = [f"{each['name']}@{each['version']}" for each in answer.json()["deleted"]]
    return deleted, {f"{each['name']}@{each['version']}": each["reason"] for each in answer.json()["kept"]}


def numbers(client: TestClient, name: str) -> list[int]:
    return [version["version"] for version in client.get(f"/v1/adapters/{name}").json()["versions"]]


def test_a_dry_run_says_what_would_go_and_a_run_does_that(client: TestClient, built: World) -> None:
    stock(client, "a", 4)
    stock(client, "b", 1)
    expected = ["a@1", "a@2"], {"a@3": "rollback", "a@4": "recent", "b@1": "recent"}
    assert gc(client, keep=1, dry_run=True) == expected
    assert numbers(client, "a") == [1, 2, 3, 4]
    assert gc(client, keep=1) == expected
    assert numbers(client, "a") == [3, 4]
    assert len(built.services.store.digests()) == 3
    assert client.post("/v1/adapters/a/rollback", json={}).json()["aliases"] == {"default": 3}


def test_without_a_number_no_version_goes(client: TestClient) -> None:
    stock(client, "a", 3)
    assert gc(client) == ([], {"a@1": "recent", "a@2": "recent", "a@3": "recent"})
    assert client.post("/v1/adapters/gc").json()["keep"] is None


@pytest.mark.parametrize(
    ("asked", "status"), [({"keep": 0}, 400), ({"keeep": 1}, 400), ({"name": "b"}, 404), ({"dry_run": "x"}, 400)]
)
def test_what_cannot_be_meant_is_refused(refusing: TestClient, asked: dict[str, Any], status: int) -> None:
    assert refusing.post("/v1/adapters/gc", json=asked).status_code == status


async def test_a_version_that_requests_use_stays_until_they_end(tiny_base: Path, tmp_path: Path) -> None:
    built = world(tiny_base, tmp_path / "data")
    async with built.running():
        for seed in (1, 2, 3):
            ingest(built, "a", seed)
        built.engine.pause(after=1)
        stream = Exchange(built.app, CHAT, chat("a@1", stream=True))
        answering = stream.start()
        await until(lambda: built.engine.running == 1)
        collected, done = await built.services.upkeep.collect(1)
        assert [each.reason for each in collected.judged] == ["leased", "rollback", "recent"]
        assert done
        built.engine.go_on()
        await answering
        assert events(stream.text)[-1] == "[DONE]"
        collected, _ = await built.services.upkeep.collect(1)
        assert [each.reason for each in collected.judged] == [None, "rollback", "recent"]
        assert await built.engine.adapter_ids() == set()


async def test_older_versions_go_by_themselves_after_an_upload(tiny_base: Path, tmp_path: Path) -> None:
    keeping = world(tiny_base, tmp_path / "data", keep_versions=2)
    with keeping.client() as client:
        stock(client, "b", 1)
        for seed in range(1, 6):
            upload(client, "a", seed)
            await until(lambda seed=seed: numbers(client, "a") == [n for n in range(seed - 1, seed + 1) if n])
        assert numbers(client, "b") == [1]


async def test_older_versions_go_also_after_a_fetch(tiny_base: Path, tmp_path: Path) -> None:
    """The fetch is a job that names the adapter: that holds none of its versions."""
    keeping = world(tiny_base, tmp_path / "data", keep_versions=1, source_roots=(str(tmp_path),))
    with keeping.client() as client:
        for seed in (1, 2, 3):
            adapter_files(seed).write(tmp_path / f"source-{seed}")
            asked = {"name": "a", "source": f"file://{tmp_path}/source-{seed}", "wait_s": PATIENCE_S}
            assert client.post("/v1/adapters", json=asked).status_code == 201
        await until(lambda: numbers(client, "a") == [2, 3])


def test_verify_finds_damage_and_repair_takes_it_out_of_service(client: TestClient, built: World) -> None:
    digest = upload(client, "a", 1)["digest"]
    assert client.post("/v1/adapters/verify").json() == {
        "object": "adapter.verification",
        "sound": True,
        "versions": 1,
        "blobs": 1,
        "size_bytes": built.services.store.size_bytes(),
        "findings": [],
    }
    path = built.services.store.path(digest) / "adapter_config.json"
    whole = path.read_bytes()
    path.write_bytes(b"{}")
    assert client.post("/v1/adapters/verify", json={"repair": False}).json()["findings"][0]["repaired"] is None
    assert client.post(CHAT, json=chat("a")).status_code == 200
    found = client.post("/v1/adapters/verify", json={"repair": True}).json()
    assert not found["sound"]
    assert [each["what"] for each in found["findings"]] == ["damaged"]
    refused = client.post(CHAT, json=chat("a"))
    assert refused.status_code == 409
    assert "its files are damaged (changed: adapter_config.json)" in refused.json()["error"]["message"]
    path.write_bytes(whole)
    assert client.post("/v1/adapters/verify", json={"repair": True}).json()["sound"]
    assert client.post(CHAT, json=chat("a")).status_code == 200


async def test_a_copy_that_the_engine_holds_is_no_garbage(built: World) -> None:
    """Another machine may have deleted the version."""
    async with built.running():
        name = ingest(built, "a", 1)
        version = built.services.registry.resolve("a")
        path = built.services.store.path(version.digest)
        async with built.services.residency.lease(name, path):
            built.services.registry.remove_version("a", 1, with_aliases=True)
            assert (await built.services.upkeep.verify(repair=True)).findings == ()
            assert (await built.services.upkeep.collect(None))[0].swept == ()
            assert path.is_dir()


async def test_a_verification_ends_with_the_server(built: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async with built.running():
        for seed in (1, 2, 3):
            ingest(built, "a", seed)
        hashes, read = built.services.store.hashes, []

        def once(digest: str) -> Any:
            read.append(digest)
            built.services.upkeep.close()
            return hashes(digest)

        monkeypatch.setattr(built.services.store, "hashes", once)
        ended = await asyncio.gather(built.services.upkeep.verify(), return_exceptions=True)
        assert "the server stops" in str(ended[0])
        assert len(read) == 1


async def test_nobody_deletes_behind_the_back_of_a_server(built: World) -> None:
    registry = Registry(built.settings.registry_url)
    with registry.unserved():
        pass
    async with built.running():
        with pytest.raises(Conflict, match="a server is up") as refused:
            with registry.unserved():
                raise AssertionError
        assert refused.value.code == "server_running"
        with registry.serving():
            pass
    with registry.unserved():
        pass
    registry.close()
