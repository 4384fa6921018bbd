"""What a stop leaves of the jobs that run here, at the moments when it is easily forgotten; and what they tell."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from adapters.jobs import Job, Jobs
from adapters.registry import Registry
from server import fine_tuning, merging
from server.jobs import JobRunner, Kind, Run


@pytest.fixture
def queue(tmp_path: Path) -> Iterator[Jobs]:
    registry = Registry(f"sqlite:///{tmp_path}/r.db")
    yield Jobs(registry.database)
    registry.close()


async def until_told(run: Run) -> Mapping[str, Any]:
    while True:
        run.report()
        await asyncio.sleep(0)


async def test_a_job_that_is_claimed_while_the_server_stops_is_given_back(
    queue: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    claimed, stopping, claim = threading.Event(), threading.Event(), queue.claim

    def claim_slowly(kinds: Collection[str], worker: str, server: str | None) -> Job | None:
        job = claim(kinds, worker, server)
        claimed.set()
        stopping.wait(10)
        return job

    monkeypatch.setattr(queue, "claim", claim_slowly)
    job_id = queue.create("fetch", {}).id
    runner = JobRunner(queue, {"fetch": Kind(until_told, 1)})
    runner.open()
    await asyncio.to_thread(claimed.wait)
    closing = asyncio.create_task(runner.close())
    await asyncio.sleep(0)  # it has begun
    stopping.set()
    await closing
    job = queue.job(job_id)
    assert (job.state, job.worker, job.attempts) == ("queued", None, 0)
    assert [event.message for event in queue.events(job_id)] == ["its worker stops; queued again"]


@pytest.mark.parametrize("module", [fine_tuning, merging])
async def test_a_job_is_as_far_as_its_last_event_says(queue: Jobs, module: Any) -> None:
    queue.create("any", {})
    job = queue.claim(["any"], "w")
    assert job is not None
    await module._pass_on(Run(job, queue, "w"), {"stage": "validating"})
    assert queue.job(job.id).progress == {"stage": "validating"}
    assert len(queue.events(job.id)) == 1
