"""Two servers on one database: each builds the merged engines that it was asked for, tells their story, and ends those
of versions that the other took away."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from server import merging
from tests.server.harness import World, ingest, until, world
from tests.server.test_merge_only import JOB_S, ask, served

MERGED = "/v1/adapters/a/versions/1/merged"


@pytest.fixture
async def two(
    database_url: str, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[World, World]]:
    monkeypatch.setattr(merging, "WORKER", "tests.server.stand_in_merger")
    monkeypatch.setattr("server.promotion.LOOK_S", 3600.0)
    shared: dict[str, Any] = {"database_url": database_url, "store_url": f"file://{tmp_path}/bucket"}
    shared |= {"quantization": "none", "memory_reserve_bytes": 0}
    one, other = (world(tiny_base, tmp_path / name, **shared) for name in ("one", "other"))
    ingest(one, "a")
    async with one.running(), other.running():
        yield one, other


async def test_whoever_is_asked_has_the_engine(two: tuple[World, World]) -> None:
    one, other = two
    for asked, idle in ((other, one), (one, other)):
        _, job = await ask(asked, "PUT", MERGED)
        assert job["server"] == asked.services.identity.id
        idle.services.runner.wake()
        ended = await asked.services.runner.ended(job["id"], JOB_S)
        assert (ended.state, ended.worker) == ("succeeded", asked.services.runner._worker)
        assert await served(asked) == "1 merged"
        if idle is one:
            assert await served(one) == "1 lora"
    for each in two:
        await each.services.promoter.look()
    stories = one.services.promotions.promotions()
    assert {(story.server, story.state) for story in stories} == {
        (each.services.identity.id, "serving") for each in two
    }


async def test_falling_back_at_one_leaves_the_other_its_job(two: tuple[World, World]) -> None:
    one, other = two
    control = one.settings.data_dir / "control"
    control.mkdir()
    (control / "hold").touch()
    _, job = await ask(one, "PUT", MERGED)
    status, end = await ask(other, "DELETE", MERGED)
    assert (status, end["job"]) == (200, None)
    (control / "hold").unlink()
    assert (await one.services.runner.ended(job["id"], JOB_S)).state == "succeeded"


async def test_an_engine_ends_when_the_other_server_takes_its_version_away(two: tuple[World, World]) -> None:
    one, other = two
    await one.services.merged.promote(f"a@{one.services.registry.resolve('a').digest[7:19]}", one.services.base.path)
    await one.services.promoter.look()
    assert (await ask(other, "DELETE", "/v1/adapters/a"))[0] == 200
    await one.services.promoter.look()
    await until(lambda: one.services.merged.snapshot() == {})
    (story,) = one.services.promotions.promotions()
    assert (story.state, story.reason) == ("demoted", "its version is out of service")
