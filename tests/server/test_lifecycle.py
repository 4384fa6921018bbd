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
def slow(tiny_base: Path, tmp_path: Path) -> World:
    return world(tiny_base, tmp_path / "slow", token_s=0.02)


def version_of(built: World, name: str) -> Version:
    return built.services.registry.resolve(name, "1")


def blobs(built: World) -> set[str]:
    return {name.split("/")[1] for name in built.stored() if name.startswith("blobs/")}


async def test_a_deletion_waits_for_the_running_stream_and_then_takes_files_and_memory(slow: World) -> None:
    async with slow.running():
        name = ingest(slow, "a")
        stream = Exchange(slow.app, CHAT, chat("a", LONG, stream=True))
        answering = stream.start()
        await until(lambda: slow.engine.running == 1)

        deletion = await slow.services.lifecycle.delete(version_of(slow, "a"))
        late = Exchange(slow.app, CHAT, chat("a"))
        await late.start()
        assert late.status == 409
        assert "adapter_draining" in late.text
        await asyncio.sleep(0.05)
        assert not deletion.done()
        assert slow.services.residency.snapshot()[name].state == "draining"
        assert len(blobs(slow)) == 1

        await asyncio.gather(answering, deletion)
        *chunks, done = events(stream.text)
        assert done == "[DONE]"
        assert len(chunks) == 22
        assert blobs(slow) == set()
        assert await slow.engine.adapter_ids() == set()
        with pytest.raises(NotFound):
            slow.services.registry.adapter("a")


async def test_a_second_deletion_joins_the_first(slow: World) -> None:
    async with slow.running():
        name = ingest(slow, "a")
        async with slow.services.residency.lease(name, slow.services.generator._resolver.resolve("a").path):  # type: ignore[arg-type]
            first = await slow.services.lifecycle.delete(version_of(slow, "a"))
            assert await slow.services.lifecycle.delete(version_of(slow, "a")) is first
        await first


async def test_a_deletion_interrupted_by_a_stop_is_finished_at_the_next_start(slow: World, tiny_base: Path) -> None:
    async with slow.running():
        name = ingest(slow, "a", 1)
        ingest(slow, "b", 2)
        lease = slow.services.residency.lease(name, slow.services.generator._resolver.resolve("a").path)  # type: ignore[arg-type]
        await lease.__aenter__()
        await slow.services.lifecycle.delete(version_of(slow, "a"))
    assert len(blobs(slow)) == 2, "nothing may go while it is leased"

    again = world(tiny_base, slow.settings.data_dir)
    async with again.running():
        await until(lambda: len(blobs(again)) == 1)
        assert [adapter.name for adapter in again.services.registry.adapters()] == ["b"]


async def test_a_version_that_drains_takes_its_aliases_along(slow: World) -> None:
    async with slow.running():
        ingest(slow, "a", 1)
        ingest(slow, "a", 2)
        slow.services.registry.set_alias("a", "stable", 1)
        await (await slow.services.lifecycle.delete(version_of(slow, "a")))
        assert dict(slow.services.registry.adapter("a").aliases) == {"default": 2}


async def test_the_same_bytes_under_another_name_stay(slow: World) -> None:
    async with slow.running():
        ingest(slow, "a", 1)
        ingest(slow, "b", 1)
        await (await slow.services.lifecycle.delete(version_of(slow, "a")))
        assert len(blobs(slow)) == 1
        answer = Exchange(slow.app, CHAT, chat("b"))
        await answer.start()
        assert answer.status == 200


async def test_quarantine_keeps_the_files_and_frees_the_memory(slow: World) -> None:
    async with slow.running():
        name = ingest(slow, "a")
        await Exchange(slow.app, CHAT, chat("a")).start()
        assert name in slow.services.residency.snapshot()
        await slow.services.lifecycle.quarantine(version_of(slow, "a"), "it said NaN")
        await until(lambda: name not in slow.services.residency.snapshot())
        assert await slow.engine.adapter_ids() == set()
        assert len(blobs(slow)) == 1
        found = version_of(slow, "a")
        assert (found.state, found.reason) == ("quarantined", "it said NaN")


async def test_quarantine_does_not_call_back_what_is_being_deleted(slow: World) -> None:
    async with slow.running():
        name = ingest(slow, "a")
        async with slow.services.residency.lease(name, slow.services.generator._resolver.resolve("a").path):  # type: ignore[arg-type]
            deletion = await slow.services.lifecycle.delete(version_of(slow, "a"))
            await slow.services.lifecycle.quarantine(version_of(slow, "a"), "it said NaN")
            assert version_of(slow, "a").state == "draining"
        await deletion


async def test_a_quarantined_version_can_be_deleted_while_it_is_still_leased(slow: World) -> None:
    async with slow.running():
        name = ingest(slow, "a")
        async with slow.services.residency.lease(name, slow.services.generator._resolver.resolve("a").path):  # type: ignore[arg-type]
            await slow.services.lifecycle.quarantine(version_of(slow, "a"), "it said NaN")
            deletion = await slow.services.lifecycle.delete(version_of(slow, "a"))
        await deletion
        assert blobs(slow) == set()
        assert slow.services.registry.adapters() == []


async def test_a_deletion_that_fails_is_logged_and_tried_again_at_the_next_start(
    slow: World, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("disk on fire")

    async with slow.running():
        ingest(slow, "a")
        with monkeypatch.context() as patched:
            patched.setattr(slow.services.ingest, "forget", fail)
            deletion = await slow.services.lifecycle.delete(version_of(slow, "a"))
            await asyncio.wait([deletion])
        assert "disk on fire" in caplog.text
    again = world(tiny_base, slow.settings.data_dir)
    async with again.running():
        await until(lambda: not again.services.registry.adapters())
    assert adapter_files().files().keys() == {"adapter_config.json", "adapter_model.safetensors"}
