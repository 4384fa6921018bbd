"""A server that does not come back, as the others see it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from adapters.jobs import Job, Jobs
from adapters.promotions import SERVING, Promotions
from adapters.registry import Registry
from adapters.servers import Servers
from server import presence
from server.presence import Presence
from tests.adapters.test_servers import silence
from tests.server.harness import until


@dataclass
class Site:
    registry: Registry
    forgotten: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.jobs = Jobs(self.registry.database)

    def stories(self, server: str) -> Promotions:
        return Promotions(self.registry.database, server)

    def presence(self, server: str) -> Presence:
        return Presence(Servers(self.registry.database, server), self.jobs, self.stories(server), self.forgotten.append)


@pytest.fixture
def site(database_url: str) -> Iterator[Site]:
    site = Site(Registry(database_url))
    yield site
    site.registry.close()


async def lost_job(site: Site) -> Job:
    """Of the server `there`, which was up once."""
    there = site.presence("there")
    await there.open()
    await there.close()
    silence(site.registry, "there", presence.LOST_S + 60)
    return site.jobs.create("merged_engine", {}, server="there")


async def test_what_only_a_lost_server_could_do_ends(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presence, "BEAT_S", 0.01)
    here, job = site.presence("here"), await lost_job(site)
    story = site.stories("there").begin("a", 1, SERVING, "asked by many")
    await here.open()
    try:
        here.clear_up()
    finally:
        await here.close()
    ended = site.jobs.job(job.id)
    assert (ended.state, ended.error) == (
        "failed",
        {"code": "server_lost", "message": "its server there was not heard of for 24 hours"},
    )
    assert site.stories("here").promotion(story.id).state == "demoted"
    assert site.forgotten == ["there"]


async def test_one_that_has_just_started_says_nothing_of_others(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a night in which all were down the first one up would take the others for lost."""
    monkeypatch.setattr(presence, "BEAT_S", 0.01)
    here, job = site.presence("here"), await lost_job(site)
    await here.open()
    silence(site.registry, "here", presence.LOST_S + 60)
    seen = Servers(site.registry.database, "there")
    await until(lambda: seen.lost(presence.LOST_S) == [])  # it has said so since
    assert site.jobs.job(job.id).state == "queued"
    monkeypatch.setattr(presence, "WATCHED_S", 0.0)
    await until(lambda: site.jobs.job(job.id).state == "failed")
    await here.close()
