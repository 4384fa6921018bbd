"""A queue in a database: claimed once, kept through crashes, ended by whoever works on it and by nobody else."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import update

from adapters import job_rows as module
from adapters import schema
from adapters.errors import Conflict, JobLost, NotFound
from adapters.jobs import Jobs
from adapters.registry import Registry

KINDS = ("fetch", "train")


@pytest.fixture
def registry(database_url: str) -> Iterator[Registry]:
    registry = Registry(database_url)
    yield registry
    registry.close()


@pytest.fixture
def jobs(registry: Registry) -> Jobs:
    return Jobs(registry.database)


def silence(registry: Registry, seconds: float) -> None:
    """As if no worker had been heard of for so long."""
    with registry.database.write() as connection:
        connection.execute(update(schema.jobs).values(beat_at=datetime.now(UTC) - timedelta(seconds=seconds)))


def messages(jobs: Jobs, job_id: str) -> list[str]:
    return [event.message for event in jobs.events(job_id)]


def test_the_life_of_a_job(jobs: Jobs) -> None:
    made = jobs.create("fetch", {"source": "hf://a/b"}, by="me")
    assert (made.state, made.kind, made.params, made.created_by, made.attempts) == (
        "queued",
        "fetch",
        {"source": "hf://a/b"},
        "me",
        0,
    )
    claimed = jobs.claim(KINDS, "w")
    assert claimed is not None
    assert (claimed.id, claimed.state, claimed.worker, claimed.attempts) == (made.id, "running", "w", 1)
    assert not jobs.beat(made.id, "w", {"bytes": 5}).cancel_requested
    assert jobs.job(made.id).progress == {"bytes": 5}
    jobs.event(made.id, "w", "half of it", {"bytes": 7}, data={"bytes": 5})
    assert jobs.job(made.id).progress == {"bytes": 7}  # at once: the job is not behind its events
    with pytest.raises(JobLost):
        jobs.event(made.id, "another", "not mine", {})
    ended = jobs.finish(made.id, "w", {"version": 1}, {"bytes": 9})
    assert (ended.state, ended.result, ended.progress, ended.error) == ("succeeded", {"version": 1}, {"bytes": 9}, None)
    assert ended.has_ended
    assert made.created_at <= (ended.started_at or made.created_at) <= (ended.ended_at or made.created_at)
    assert messages(jobs, made.id) == ["half of it", "finished"]
    assert jobs.events(made.id)[0].data == {"bytes": 5}


def test_a_job_survives_its_process(jobs: Jobs, registry: Registry) -> None:
    made = jobs.create("fetch", {})
    again = Registry(registry.database.shown_url.replace("***", ""))
    assert Jobs(again.database).job(made.id) == made
    again.close()


def test_the_oldest_of_the_wanted_kinds_is_claimed(jobs: Jobs) -> None:
    train, first, second = (jobs.create(kind, {}).id for kind in ("train", "fetch", "fetch"))
    claimed = [jobs.claim(["fetch"], "w"), jobs.claim(["fetch"], "w"), jobs.claim(["fetch"], "w")]
    assert [job.id if job else None for job in claimed] == [*sorted([first, second]), None]
    assert jobs.job(train).state == "queued"


def test_workers_that_claim_together_never_get_the_same(jobs: Jobs) -> None:
    wanted = {jobs.create("fetch", {}).id for _ in range(24)}
    got: list[str] = []

    def work(worker: str) -> None:
        while (job := jobs.claim(KINDS, worker)) is not None:
            got.append(job.id)

    threads = [threading.Thread(target=work, args=(f"w{number}",)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == sorted(wanted)


def test_a_failure_has_code_and_message(jobs: Jobs) -> None:
    made = jobs.create("fetch", {})
    jobs.claim(KINDS, "w")
    ended = jobs.fail(made.id, "w", "dora", "DoRA cannot be served", status=422)
    assert (ended.state, ended.error) == (
        "failed",
        {"code": "dora", "message": "DoRA cannot be served", "status": 422},
    )
    assert [(event.level, event.message) for event in jobs.events(made.id)] == [
        ("error", "failed: DoRA cannot be served (dora)")
    ]


def test_what_waits_is_cancelled_at_once_and_never_claimed(jobs: Jobs) -> None:
    made = jobs.create("fetch", {})
    assert jobs.cancel(made.id, by="me").state == "cancelled"
    assert jobs.cancel(made.id).state == "cancelled"
    assert jobs.claim(KINDS, "w") is None
    assert messages(jobs, made.id) == ["cancelled by me while nobody worked on it"]


def test_what_runs_is_asked_to_stop(jobs: Jobs) -> None:
    made = jobs.create("fetch", {})
    jobs.claim(KINDS, "w")
    assert jobs.cancel(made.id).state == "running"
    assert jobs.cancel(made.id).cancel_requested
    assert jobs.beat(made.id, "w", {}).cancel_requested
    assert jobs.cancelled(made.id, "w").state == "cancelled"
    assert messages(jobs, made.id) == ["asked to stop", "cancelled"]


def test_what_has_ended_cannot_be_cancelled(jobs: Jobs) -> None:
    made = jobs.create("fetch", {})
    jobs.claim(KINDS, "w")
    jobs.finish(made.id, "w", {}, {})
    with pytest.raises(Conflict, match="has succeeded already") as error:
        jobs.cancel(made.id)
    assert error.value.code == "job_ended"


def test_what_waits_is_paused_at_once_and_claimed_again_when_resumed(jobs: Jobs) -> None:
    made = jobs.create("train", {})
    assert jobs.pause(made.id, by="me").state == "paused"
    assert jobs.pause(made.id).state == "paused"
    assert jobs.claim(KINDS, "w") is None
    assert jobs.resume(made.id, by="me").state == "queued"
    assert jobs.claim(KINDS, "w") is not None
    assert messages(jobs, made.id) == ["paused by me", "resumed by me"]


def test_what_runs_is_asked_to_pause(jobs: Jobs) -> None:
    made = jobs.create("train", {})
    jobs.claim(KINDS, "w")
    assert jobs.pause(made.id).state == "running"
    assert jobs.beat(made.id, "w", {}).pause_requested
    aside = jobs.paused(made.id, "w")
    assert (aside.state, aside.worker, aside.pause_requested, aside.attempts) == ("paused", None, False, 0)
    assert jobs.cancel(made.id).state == "cancelled"
    assert messages(jobs, made.id) == ["asked to pause", "paused", "cancelled while nobody worked on it"]


def test_who_resumes_before_the_worker_has_heard_of_the_pause_takes_it_back(jobs: Jobs) -> None:
    made = jobs.create("train", {})
    jobs.claim(KINDS, "w")
    jobs.pause(made.id)
    assert jobs.resume(made.id).state == "running"
    assert not jobs.beat(made.id, "w", {}).pause_requested


def test_what_has_ended_is_neither_paused_nor_resumed(jobs: Jobs) -> None:
    made = jobs.create("train", {})
    jobs.cancel(made.id)
    for verb, call in {"pause": jobs.pause, "resume": jobs.resume}.items():
        with pytest.raises(Conflict, match=f"nothing to {verb}") as error:
            call(made.id)
        assert error.value.code == "job_ended"


def test_a_silent_worker_that_was_asked_to_pause_leaves_it_paused(jobs: Jobs, registry: Registry) -> None:
    made = jobs.create("train", {})
    jobs.claim(KINDS, "w")
    jobs.pause(made.id)
    silence(registry, 61)
    assert [(job.state, job.pause_requested) for job in jobs.recover(KINDS, silent_s=60)] == [("paused", False)]


def test_what_dies_of_its_work_is_queued_again_but_not_for_ever(jobs: Jobs) -> None:
    made = jobs.create("train", {})
    states = []
    for _ in range(module.MAX_ATTEMPTS):
        assert jobs.claim(KINDS, "w") is not None
        states.append(jobs.interrupted(made.id, "w", "its process was killed").state)
    assert states == ["queued"] * (module.MAX_ATTEMPTS - 1) + ["failed"]
    assert messages(jobs, made.id)[0] == "its process was killed; queued again"
    assert messages(jobs, made.id)[-1].endswith("the last time its process was killed")
    with pytest.raises(JobLost):
        jobs.interrupted(made.id, "w", "too late")


def test_the_latest_events_come_first_and_in_pages(jobs: Jobs) -> None:
    made = jobs.create("train", {})
    jobs.claim(["train"], "w")
    for number in range(5):
        jobs.event(made.id, "w", str(number), {})
    first = jobs.latest_events(made.id, limit=2)
    assert [event.message for event in first] == ["4", "3"]
    assert [event.message for event in jobs.latest_events(made.id, before=first[-1].id)] == ["2", "1", "0"]


def test_a_list_can_be_of_one_kind(jobs: Jobs) -> None:
    jobs.create("fetch", {})
    made = jobs.create("train", {})
    assert [job.id for job in jobs.jobs(kind="train")] == [made.id]


def test_open_are_those_that_wait_or_run(jobs: Jobs) -> None:
    running, ended, waiting, paused, _ = (jobs.create(kind, {}).id for kind in (*["merge"] * 4, "fetch"))
    assert [jobs.claim(["merge"], "w"), jobs.claim(["merge"], "w")] != [None, None]
    jobs.finish(ended, "w", {}, {})
    jobs.pause(paused)
    assert [job.id for job in jobs.open_jobs("merge")] == [waiting, running]


def test_a_silent_worker_loses_its_job(jobs: Jobs, registry: Registry) -> None:
    made = jobs.create("fetch", {})
    jobs.claim(KINDS, "first")
    assert jobs.recover(KINDS, silent_s=60) == []
    silence(registry, 61)
    assert jobs.recover(["train"], silent_s=60) == []
    assert [job.state for job in jobs.recover(KINDS, silent_s=60)] == ["queued"]
    late: Callable[[], object]
    for late in (
        lambda: jobs.beat(made.id, "first", {}),
        lambda: jobs.finish(made.id, "first", {}, {}),
        lambda: jobs.fail(made.id, "first", "x", "x"),
        lambda: jobs.cancelled(made.id, "first"),
        lambda: jobs.release(made.id, "first"),
    ):
        with pytest.raises(JobLost, match="no longer first's"):
            late()
    second = jobs.claim(KINDS, "second")
    assert second is not None
    assert second.attempts == 2
    with pytest.raises(JobLost):
        jobs.beat(made.id, "first", {})
    assert jobs.finish(made.id, "second", {}, {}).state == "succeeded"
    assert messages(jobs, made.id) == ["its worker was not heard of any more; queued again", "finished"]


def test_a_silent_worker_that_was_asked_to_stop_leaves_it_cancelled(jobs: Jobs, registry: Registry) -> None:
    made = jobs.create("fetch", {})
    jobs.claim(KINDS, "w")
    jobs.cancel(made.id)
    silence(registry, 61)
    assert [job.state for job in jobs.recover(KINDS, silent_s=60)] == ["cancelled"]
    assert jobs.job(made.id).ended_at is not None


def test_a_job_that_kills_its_workers_is_given_up(jobs: Jobs, registry: Registry) -> None:
    made = jobs.create("fetch", {})
    states = []
    for _ in range(module.MAX_ATTEMPTS):
        assert jobs.claim(KINDS, "w") is not None
        silence(registry, 61)
        states += [job.state for job in jobs.recover(KINDS, silent_s=60)]
    assert states == ["queued"] * (module.MAX_ATTEMPTS - 1) + ["failed"]
    error = jobs.job(made.id).error
    assert error is not None
    assert error["code"] == "worker_lost"


def test_a_worker_that_stops_in_good_order_gives_it_back(jobs: Jobs) -> None:
    made = jobs.create("fetch", {})
    for _ in range(module.MAX_ATTEMPTS + 1):
        assert jobs.claim(KINDS, "w") is not None
        assert jobs.release(made.id, "w").state == "queued"
    assert jobs.job(made.id).attempts == 0


def test_lists_are_newest_first_in_pages_and_by_state(jobs: Jobs) -> None:
    ids = sorted((jobs.create("fetch", {}).id for _ in range(5)), reverse=True)
    assert [job.id for job in jobs.jobs()] == ids
    assert [job.id for job in jobs.jobs(limit=2)] == ids[:2]
    assert [job.id for job in jobs.jobs(after=ids[1], limit=2)] == ids[2:4]
    jobs.cancel(ids[2])
    assert [job.id for job in jobs.jobs(state="cancelled")] == [ids[2]]
    assert (jobs.count("queued", KINDS), jobs.count("cancelled", KINDS), jobs.count("queued", ["train"])) == (4, 1, 0)


def test_old_jobs_are_forgotten_with_their_events(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEPT", 2)
    waiting = jobs.create("train", {}).id
    ended = []
    for _ in range(4):
        ended.append(jobs.create("fetch", {}).id)
        jobs.claim(["fetch"], "w")
        jobs.finish(ended[-1], "w", {}, {})
    kept = sorted(ended, reverse=True)[:2]
    assert [job.id for job in jobs.jobs()] == sorted([waiting, *kept], reverse=True)
    with pytest.raises(NotFound, match="the last 2 that ended are kept"):
        jobs.events(min(ended))


def test_events_are_bounded_and_read_on_from_where_one_was(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EVENTS_KEPT", 5)
    made, other = jobs.create("fetch", {}).id, jobs.create("fetch", {}).id
    assert all(jobs.claim(["fetch"], "w") for _ in range(2))
    for number in range(8):
        jobs.event(made, "w", f"{number}" * 3000, {})
        jobs.event(other, "w", "another's", {})
    found = jobs.events(made)
    assert [event.message for event in found] == [f"{number}" * 2000 for number in range(3, 8)]
    assert jobs.events(made, after=found[2].id) == found[3:]
    assert jobs.events(made, limit=2) == found[:2]


@pytest.mark.parametrize("job_id", ["job-0", "", "x" * 5000, "a\0b", "ä"])
def test_a_job_that_is_not_there(jobs: Jobs, job_id: str) -> None:
    for ask in (jobs.job, jobs.events, jobs.cancel):
        with pytest.raises(NotFound):
            ask(job_id)
