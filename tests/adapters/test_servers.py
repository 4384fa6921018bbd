"""Who is on a registry, and what becomes of what only one server could do."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import update

from adapters import schema
from adapters.jobs import Jobs
from adapters.promotions import ADVISED, SERVING, Promotions
from adapters.registry import Registry
from adapters.servers import Servers


@pytest.fixture
def registry(database_url: str) -> Iterator[Registry]:
    registry = Registry(database_url)
    yield registry
    registry.close()


def silence(registry: Registry, server: str, seconds: float) -> None:
    at = datetime.now(UTC) - timedelta(seconds=seconds)
    with registry.database.write() as connection:
        connection.execute(update(schema.servers).where(schema.servers.c.id == server).values(seen_at=at))


def test_one_that_is_silent_is_lost_until_it_is_heard_again(registry: Registry) -> None:
    here, there = Servers(registry.database, "here"), Servers(registry.database, "there")
    for each in (here, there):
        each.seen()
        each.seen()
        silence(registry, each.server, 100)
    assert (here.lost(99), here.lost(200)) == (["there"], [])
    there.seen()
    assert here.lost(99) == []
    silence(registry, "there", 100)
    here.forget("there")
    assert here.lost(99) == []


def test_a_job_that_is_one_servers_own_waits_for_it(registry: Registry) -> None:
    jobs = Jobs(registry.database)
    own, anybodys = jobs.create("merged_engine", {}, server="here").id, jobs.create("merged_engine", {}).id
    assert (jobs.job(own).server, jobs.job(anybodys).server) == ("here", None)

    def claimed(worker: str, server: str | None) -> str | None:
        job = jobs.claim(["merged_engine"], worker, server)
        return None if job is None else job.id

    assert [claimed("w1", "there"), claimed("w1", "there")] == [anybodys, None]
    assert claimed("w2", None) is None
    assert claimed("w3", "here") == own
    jobs.recover(["merged_engine"], -1)  # its worker is gone; whoever notices that does not get the job
    assert (claimed("w1", "there"), claimed("w1", "there"), claimed("w3", "here")) == (anybodys, None, own)


def test_what_waits_for_one_that_does_not_come_back_ends(registry: Registry) -> None:
    jobs = Jobs(registry.database)
    queued, paused = (jobs.create("merged_engine", {}, server="there").id for _ in range(2))
    jobs.pause(paused)
    others = [jobs.create("merged_engine", {}, server="here").id, jobs.create("fetch", {}).id]
    assert [job.id for job in jobs.abandon("there", "it burned")] == sorted([queued, paused])
    for job in map(jobs.job, (queued, paused)):
        assert (job.state, job.error) == ("failed", {"code": "server_lost", "message": "it burned"})
    assert jobs.events(queued)[-1].message == "failed: it burned (server_lost)"
    assert {jobs.job(job).state for job in others} == {"queued"}
    assert jobs.abandon("there", "it burned") == []


def test_the_stories_of_one_that_does_not_come_back_end(registry: Registry) -> None:
    here, there = Promotions(registry.database, "here"), Promotions(registry.database, "there")
    mine = here.begin("a", 1, SERVING, "asked by many")
    for state in (SERVING, ADVISED):
        there.begin("b", 1, state, "asked by many")
    here.abandon("there", "it burned")
    assert there.mine() == []
    told = [(each.adapter, each.state, each.reason) for each in here.promotions()]
    assert sorted(told[:2]) == [("b", "demoted", "it burned"), ("b", "withdrawn", "it burned")]
    assert here.mine() == [mine]
