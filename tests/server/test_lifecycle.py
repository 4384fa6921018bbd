from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from adapters.errors import NotFound
from adapters.registry import Version
from tests.server.harness import Exchange, World, adapter_files, chat, events, ingest, until, world

CHAT = "/v1/chat/completions"
LONG = " ".join("x" * 20)


@pytest.fixture
def built(tiny_base: Path, tmp_path: Path) -> World:
    return world(tiny_base, tmp_path / "data")


def version_of(built: World, name: str) -> Version:
    return built.services.registry.resolve(name, "1")


def blobs(built: World) -> set[str]:
    return {name.split("/")[1] for name in built.stored() if name.startswith("blobs/")}


async def test_a_deletion_waits_for_the_running_stream_and_then_takes_files_and_memory(built: World) -> None:
    async with built.running():
        name = ingest(built, "a")
        built.engine.pause(after=1)
        stream = Exchange(built.app, CHAT, chat("a", LONG, stream=True))
        answering = stream.start()
        await until(lambda: built.engine.running == 1)

        deletion = await built.services.lifecycle.delete(version_of(built, "a"))
        late = Exchange(built.app, CHAT, chat("a"))
        await late.start()
        assert late.status == 409
        assert "adapter_draining" in late.text
        await until(lambda: built.services.residency.snapshot()[name].state == "draining")
        await asyncio.sleep(0.05)
        assert not deletion.done()
        assert len(blobs(built)) == 1

        built.engine.go_on()
        await asyncio.gather(answering, deletion)
        *chunks, done = events(stream.text)
        assert done == "[DONE]"
        assert len(chunks) == 22
        assert blobs(built) == set()
        assert await built.engine.adapter_ids() == set()
        with pytest.raises(NotFound):
            built.services.registry.adapter("a")


async def test_a_second_deletion_joins_the_first(built: World) -> None:
    async with built.running():
        name = ingest(built, "a")
        async with built.services.residency.lease(name, built.services.generator._resolver.resolve("a").path):  # type: ignore[arg-type]
            first = await built.services.lifecycle.delete(version_of(built, "a"))
            assert await built.services.lifecycle.delete(version_of(built, "a")) is first
        await first


async def test_a_deletion_interrupted_by_a_stop_is_finished_at_the_next_start(built: World, tiny_base: Path) -> None:
    async with built.running():
        name = ingest(built, "a", 1)
        ingest(built, "b", 2)
        lease = built.services.residency.lease(name, built.services.generator._resolver.resolve("a").path)  # type: ignore[arg-type]
        await lease.__aenter__()
        await built.services.lifecycle.delete(version_of(built, "a"))
    assert len(blobs(built)) == 2, "nothing may go while it is leased"

    again = world(tiny_base, built.settings.data_dir)
    async with again.running():
        await until(lambda: len(blobs(again)) == 1)
        assert [adapter.name for adapter in again.services.registry.adapters()] == ["b"]


async def test_a_version_that_drains_takes_its_aliases_along(built: World) -> None:
    async with built.running():
        ingest(built, "a", 1)
        ingest(built, "a", 2)
        built.services.registry.set_alias("a", "stable", 1)
        await (await built.services.lifecycle.delete(version_of(built, "a")))
        assert dict(built.services.registry.adapter("a").aliases) == {"default": 2}


async def test_the_same_bytes_under_another_name_stay(built: World) -> None:
    async with built.running():
        ingest(built, "a", 1)
        ingest(built, "b", 1)
        await (await built.services.lifecycle.delete(version_of(built, "a")))
        assert len(blobs(built)) == 1
        answer = Exchange(built.app, CHAT, chat("b"))
        await answer.start()
        assert answer.status == 200


async def test_quarantine_keeps_the_files_and_frees_the_memory(built: World) -> None:
    async with built.running():
        name = ingest(built, "a")
        await Exchange(built.app, CHAT, chat("a")).start()
        assert name in built.services.residency.snapshot()
        await built.services.lifecycle.quarantine(version_of(built, "a"), "it said NaN")
        await until(lambda: name not in built.services.residency.snapshot())
        assert await built.engine.adapter_ids() == set()
        assert len(blobs(built)) == 1
        found = version_of(built, "a")
        assert (found.state, found.reason) == ("quarantined", "it said NaN")


async def test_quarantine_does_not_call_back_what_is_being_deleted(built: World) -> None:
    async with built.running():
        name = ingest(built, "a")
        async with built.services.residency.lease(name, built.services.generator._resolver.resolve("a").path):  # type: ignore[arg-type]
            deletion = await built.services.lifecycle.delete(version_of(built, "a"))
            await built.services.lifecycle.quarantine(version_of(built, "a"), "it said NaN")
            assert version_of(built, "a").state == "draining"
        await deletion


async def test_a_quarantined_version_can_be_deleted_while_it_is_still_leased(built: World) -> None:
    async with built.running():
        name = ingest(built, "a")
        async with built.services.residency.lease(name, built.services.generator._resolver.resolve("a").path):  # type: ignore[arg-type]
            await built.services.lifecycle.quarantine(version_of(built, "a"), "it said NaN")
            deletion = await built.services.lifecycle.delete(version_of(built, "a"))
        await deletion
        assert blobs(built) == set()
        assert built.services.registry.adapters() == []


async def test_a_deletion_that_fails_is_logged_and_tried_again_at_the_next_start(
    built: World, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("disk on fire")

    async with built.running():
        ingest(built, "a")
        with monkeypatch.context() as patched:
            patched.setattr(built.services.ingest, "forget", fail)
            deletion = await built.services.lifecycle.delete(version_of(built, "a"))
            await asyncio.wait([deletion])
        assert "disk on fire" in caplog.text
    again = world(tiny_base, built.settings.data_dir)
    async with again.running():
        await until(lambda: not again.services.registry.adapters())
    assert adapter_files().files().keys() == {"adapter_config.json", "adapter_model.safetensors"}
