"""A source becomes a job, and the job a version; jobs are listed, followed, cancelled, and outlive their process."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from adapters.jobs import Jobs
from server import jobs as runner
from tests.adapters.factories import AdapterFiles, lora_config, tar
from tests.adapters.web_server import Answer, WebServer, serving
from tests.server.conftest import wait_until_ready
from tests.server.harness import (
    KEYS,
    PATIENCE_S,
    Exchange,
    World,
    adapter_files,
    as_parts,
    chat,
    events,
    said,
    until,
    until_let_go,
    world,
)

ADAPTERS, JOBS = "/v1/adapters", "/v1/jobs"
ARCHIVE = tar(adapter_files(1).files())


@pytest.fixture
def gate() -> threading.Event:
    """Until it is set, `/slow.tar.gz` does not come to its end."""
    return threading.Event()


@pytest.fixture
def web(gate: threading.Event) -> Iterator[WebServer]:
    refused = tar(AdapterFiles(config=lora_config(alora_invocation_tokens=[1])).files())
    answers = {"/good.tar.gz": ARCHIVE, "/slow.tar.gz": bytes(1 << 20) + ARCHIVE, "/refused.tar.gz": refused}

    def respond(path: str, _: Any) -> Answer:
        content = answers.get(path.partition("?")[0])
        return Answer(404) if content is None else Answer(200, content)

    with serving(respond) as server:
        server.before_chunk = lambda path, start: gate.wait(PATIENCE_S) if path == "/slow.tar.gz" and start else None
        yield server
        gate.set()


@pytest.fixture
def roots(tmp_path: Path, web: WebServer) -> tuple[str, ...]:
    adapter_files(2).write(tmp_path / "roots" / "run")
    return (str(tmp_path / "roots"), web.url)


@pytest.fixture
def built(tiny_base: Path, tmp_path: Path, roots: tuple[str, ...]) -> World:
    return world(tiny_base, tmp_path / "data", source_roots=roots)


def ask(client: TestClient, source: str, name: str = "a", **fields: Any) -> Any:
    return client.post(ADAPTERS, json={"name": name, "source": source, **fields})


def end_of(client: TestClient, job_id: str) -> dict[str, Any]:
    deadline = time.monotonic() + PATIENCE_S
    while (job := client.get(f"{JOBS}/{job_id}").json())["ended_at"] is None:
        assert time.monotonic() < deadline, job
        time.sleep(0.02)
    until_let_go(client, job_id)
    return dict(job)


def test_a_source_becomes_a_job_and_the_job_a_version(client: TestClient, web: WebServer) -> None:
    asked = ask(client, f"{web.url}/good.tar.gz?signature=swordfish", description="fetched", tags={"team": "blue"})
    assert asked.status_code == 202
    job = asked.json()
    assert asked.headers["location"] == f"{JOBS}/{job['id']}"
    assert (job["object"], job["kind"], job["state"], job["result"], job["error"]) == (
        "job",
        "fetch",
        "queued",
        None,
        None,
    )
    ended = end_of(client, job["id"])
    assert ended["state"] == "succeeded"
    assert ended["progress"] == {"bytes": len(ARCHIVE), "total_bytes": len(ARCHIVE), "file": "good.tar.gz"}
    version = client.get(f"{ADAPTERS}/a/versions/1").json()
    assert ended["result"] == {
        "name": "a",
        "version": 1,
        "digest": version["digest"],
        "state": "ready",
        "created": True,
    }
    assert version["manifest"]["lineage"]["source"] == {"url": f"{web.url}/good.tar.gz?…"}
    assert version["tags"] == {"team": "blue"}
    assert client.get(f"{ADAPTERS}/a").json()["description"] == "fetched"
    assert said(client.post("/v1/chat/completions", json=chat("a")).json()).startswith("[a@")
    assert "swordfish" not in str(ended) + client.get(f"{JOBS}/{job['id']}/events").text


def test_whoever_waits_gets_the_version_as_an_upload_would(client: TestClient, web: WebServer, roots: Any) -> None:
    first = ask(client, f"{web.url}/good.tar.gz", wait_s=PATIENCE_S)
    assert (first.status_code, first.json()["created"]) == (201, True)
    assert first.headers["location"] == "/v1/adapters/a/versions/1"
    again = ask(client, f"{web.url}/good.tar.gz", wait_s=PATIENCE_S)
    assert (again.status_code, again.json()["created"], again.json()["version"]) == (200, False, 1)
    directory = ask(client, f"file://{roots[0]}/run", wait_s=PATIENCE_S, promote=False)
    assert (directory.status_code, directory.json()["version"], directory.json()["aliases"]) == (201, 2, [])
    uploaded = client.post(ADAPTERS, data={"name": "b"}, files=as_parts(adapter_files(2).files())).json()
    assert uploaded["digest"] == directory.json()["digest"]


def test_whoever_does_not_want_to_wait_longer_gets_the_job(
    client: TestClient, web: WebServer, gate: threading.Event
) -> None:
    answer = ask(client, f"{web.url}/slow.tar.gz", wait_s=0.2)
    assert (answer.status_code, answer.json()["object"]) == (202, "job")
    gate.set()
    assert end_of(client, answer.json()["id"])["state"] == "failed"  # a megabyte of zeros is no archive


def test_what_the_gate_refuses_fails_as_the_upload_would(client: TestClient, web: WebServer, built: World) -> None:
    files = AdapterFiles(config=lora_config(alora_invocation_tokens=[1])).files()
    uploaded = client.post(ADAPTERS, data={"name": "a"}, files=as_parts(files))
    waited = ask(client, f"{web.url}/refused.tar.gz", wait_s=PATIENCE_S)
    assert (waited.status_code, waited.json()) == (uploaded.status_code, uploaded.json())
    error = uploaded.json()["error"]
    job = client.get(JOBS, params={"state": "failed"}).json()["data"][0]
    assert job["error"] == {"code": error["code"], "message": error["message"], "status": uploaded.status_code}
    assert client.get(ADAPTERS).json()["data"] == []
    assert list((built.settings.data_dir / "adapters" / "staging").iterdir()) == []


@pytest.mark.parametrize(
    ("fields", "status", "code"),
    [
        ({"source": "s3://bucket/a"}, 403, "source_not_allowed"),
        ({"source": "file:///etc"}, 202, ""),
        ({"source": "https://169.254.169.254/a.zip"}, 202, ""),
        ({"source": "/srv/a"}, 400, "bad_source"),
        ({"source": "simplecache::s3://b/a"}, 400, "bad_source"),
        ({"source": "https://me:swordfish@host/a.zip"}, 400, "bad_source"),
        ({"source": 7}, 400, "bad_request"),
        ({}, 400, "bad_request"),
        ({"source": "hf://o/n", "name": "../x"}, 422, "bad_name"),
        ({"source": "hf://o/n", "name": "tiny"}, 422, "bad_name"),
        ({"source": "hf://o/n", "sha256": "abc"}, 400, "bad_sha256"),
        ({"source": "hf://o/n", "description": "x" * 5000}, 422, "bad_description"),
        ({"source": "hf://o/n", "wait_s": 601}, 400, "bad_request"),
        ({"source": "hf://o/n", "promot": True}, 400, "bad_request"),
        ({"source": "x" * 3000}, 400, "bad_request"),
    ],
)
def test_what_is_wrong_already_makes_no_job(client: TestClient, fields: dict[str, Any], status: int, code: str) -> None:
    answer = client.post(ADAPTERS, json={"name": "a", **fields})
    assert answer.status_code == status, answer.text
    assert "swordfish" not in answer.text
    if code:
        assert answer.json()["error"]["code"] == code
        assert client.get(JOBS).json()["data"] == []
    else:  # what an address really means is seen when it is read
        assert end_of(client, answer.json()["id"])["error"]["code"] == "source_not_allowed"


def test_a_sha256_is_checked_of_what_is_fetched(client: TestClient, web: WebServer) -> None:
    answer = ask(client, f"{web.url}/good.tar.gz", sha256="0" * 64, wait_s=PATIENCE_S)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "sha256_mismatch")


def test_a_running_job_shows_its_progress_and_can_be_cancelled(
    client: TestClient, web: WebServer, gate: threading.Event, built: World
) -> None:
    job_id = ask(client, f"{web.url}/slow.tar.gz").json()["id"]
    deadline = time.monotonic() + PATIENCE_S
    while not (job := client.get(f"{JOBS}/{job_id}").json())["progress"].get("bytes"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert (job["state"], job["progress"]["total_bytes"]) == ("running", (1 << 20) + len(ARCHIVE))
    cancelled = client.post(f"{JOBS}/{job_id}/cancel").json()
    assert cancelled["cancel_requested"]
    gate.set()
    assert end_of(client, job_id)["state"] == "cancelled"
    assert client.post(f"{JOBS}/{job_id}/cancel").json()["state"] == "cancelled"
    assert client.get(ADAPTERS).json()["data"] == []
    assert list((built.settings.data_dir / "adapters" / "staging").iterdir()) == []


def test_whoever_waits_for_a_job_that_is_cancelled_hears_it(
    built: World, web: WebServer, gate: threading.Event
) -> None:
    async def scene() -> None:
        async with built.running():
            waiting = Exchange(
                built.app, ADAPTERS, {"name": "a", "source": f"{web.url}/slow.tar.gz", "wait_s": PATIENCE_S}
            )
            task = waiting.start()
            await until(lambda: built.services.runner.running)
            (job,) = built.services.jobs.jobs()
            cancelling = Exchange(built.app, f"{JOBS}/{job.id}/cancel", {})
            await cancelling.start()
            gate.set()
            await task
            assert waiting.status == 409
            assert "job_cancelled" in waiting.text

    asyncio.run(scene())


def test_too_late_to_cancel(client: TestClient, web: WebServer) -> None:
    job_id = ask(client, f"{web.url}/good.tar.gz").json()["id"]
    end_of(client, job_id)
    answer = client.post(f"{JOBS}/{job_id}/cancel")
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "job_ended")


def test_at_most_so_many_run_at_once_and_the_others_wait(
    tiny_base: Path, tmp_path: Path, web: WebServer, gate: threading.Event
) -> None:
    with world(tiny_base, tmp_path / "data", source_roots=(web.url,), max_fetches=1).client() as client:
        wait_until_ready(client)
        first, second = (ask(client, f"{web.url}/{name}.tar.gz").json()["id"] for name in ("slow", "good"))
        deadline = time.monotonic() + PATIENCE_S
        while client.get(f"{JOBS}/{first}").json()["state"] != "running":
            assert time.monotonic() < deadline
        assert client.get(f"{JOBS}/{second}").json()["state"] == "queued"
        gate.set()
        assert end_of(client, second)["state"] == "succeeded"


def test_events_are_listed_and_read_on(client: TestClient, web: WebServer) -> None:
    job_id = ask(client, f"{web.url}/good.tar.gz").json()["id"]
    end_of(client, job_id)
    found = client.get(f"{JOBS}/{job_id}/events").json()
    assert [event["message"] for event in found["data"]] == [
        f"reading {web.url}/good.tar.gz",
        "reading good.tar.gz",
        "a@1 is registered",
        "finished",
    ]
    first = client.get(f"{JOBS}/{job_id}/events", params={"limit": 1}).json()
    assert (first["has_more"], first["data"]) == (True, found["data"][:1])
    rest = client.get(f"{JOBS}/{job_id}/events", params={"after": first["last_id"]}).json()
    assert rest["data"] == found["data"][1:]


def test_a_stream_follows_a_job_to_its_end(client: TestClient, web: WebServer) -> None:
    job_id = ask(client, f"{web.url}/good.tar.gz").json()["id"]
    answer = client.get(f"{JOBS}/{job_id}/events", params={"stream": "true"})
    assert answer.headers["content-type"].startswith("text/event-stream")
    told = events(answer.text)
    assert told[-1] == "[DONE]"
    assert [each["message"] for each in told[:-1] if each["object"] == "job.event"][-1] == "finished"
    jobs = [each for each in told[:-1] if each["object"] == "job"]
    assert jobs[-1] == client.get(f"{JOBS}/{job_id}").json()
    assert all(one != other for one, other in pairwise(jobs))


def test_jobs_are_listed_newest_first_in_pages_and_by_state(client: TestClient, web: WebServer) -> None:
    ids = [ask(client, f"{web.url}/{name}.tar.gz").json()["id"] for name in ("good", "refused", "none")]
    states = [end_of(client, job_id)["state"] for job_id in ids]
    assert states == ["succeeded", "failed", "failed"]
    newest = sorted(ids, reverse=True)
    page = client.get(JOBS, params={"limit": 2}).json()
    assert ([job["id"] for job in page["data"]], page["has_more"], page["last_id"]) == (newest[:2], True, newest[1])
    rest = client.get(JOBS, params={"after": page["last_id"]}).json()
    assert ([job["id"] for job in rest["data"]], rest["has_more"]) == (newest[2:], False)
    assert {job["id"] for job in client.get(JOBS, params={"state": "failed"}).json()["data"]} == set(ids[1:])
    assert client.get(JOBS, params={"state": "lost"}).status_code == 400
    assert 'loraplex_jobs_total{kind="fetch",state="failed"} 2.0' in client.get("/metrics").text


@pytest.mark.parametrize("path", ["", "/events", "/events?stream=true"])
def test_a_job_that_is_not_there(client: TestClient, path: str) -> None:
    assert client.get(f"{JOBS}/job-0{path}").status_code == 404


def test_the_job_remembers_whose_it_is_and_so_does_the_alias(tiny_base: Path, tmp_path: Path, web: WebServer) -> None:
    keys = tuple(f"{scope}:{secret}" for scope, secret in KEYS.items())
    with world(tiny_base, tmp_path / "data", source_roots=(web.url,), api_keys=keys).client() as client:
        client.headers["authorization"] = f"Bearer {KEYS['publish']}"
        job = ask(client, f"{web.url}/good.tar.gz").json()
        assert end_of(client, job["id"])["created_by"] == "settings-2"
        client.headers["authorization"] = f"Bearer {KEYS['infer']}"
        assert client.get(f"{ADAPTERS}/a/aliases/default").json()["moves"][0]["by"] == "settings-2"


def test_a_stop_gives_the_job_back_and_the_next_start_does_it(
    tiny_base: Path, tmp_path: Path, web: WebServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "STOP_S", 0.1)
    web.pause_s, web.chunk_bytes = 0.05, 1  # a minute and more in all
    with world(tiny_base, tmp_path / "data", source_roots=(web.url,)).client() as client:
        job_id = ask(client, f"{web.url}/good.tar.gz").json()["id"]
        while client.get(f"{JOBS}/{job_id}").json()["state"] != "running":
            pass
    web.pause_s, web.chunk_bytes = 0, 1 << 16
    with world(tiny_base, tmp_path / "data", source_roots=(web.url,)).client() as client:
        wait_until_ready(client)
        job = end_of(client, job_id)
        assert (job["state"], job["attempts"], job["result"]["created"]) == ("succeeded", 1, True)
        told = [event["message"] for event in client.get(f"{JOBS}/{job_id}/events").json()["data"]]
        assert "its worker stops; queued again" in told


def test_a_start_takes_up_at_once_what_no_other_server_can_be_working_on(built: World, roots: tuple[str, ...]) -> None:
    queue = built.services.jobs
    source = {"name": "a", "source": f"file://{roots[0]}/run"}
    fetch, other = queue.create("fetch", source), queue.create("train", {})
    assert queue.claim(["fetch"], "dead")
    assert queue.claim(["train"], "worker")
    with built.client() as client:
        assert queue.job(fetch.id).worker != "dead"
        assert end_of(client, fetch.id)["state"] == "succeeded"
        assert queue.job(other.id).worker == "worker"


def test_beside_another_server_a_start_waits_for_its_silence(built: World) -> None:
    queue = built.services.jobs
    fetch = queue.create("fetch", {"name": "a", "source": "hf://o/n"})
    assert queue.claim(["fetch"], "other server")
    with built.services.registry.serving(), built.client():
        assert queue.job(fetch.id).worker == "other server"


def test_an_error_that_nobody_foresaw_ends_the_job_and_says_nothing_of_its_inside(
    client: TestClient, web: WebServer, built: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("swordfish")

    monkeypatch.setattr(built.services.ingest, "upload", fail)
    answer = ask(client, f"{web.url}/good.tar.gz", wait_s=PATIENCE_S)
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
    assert "swordfish" not in answer.text
    assert "swordfish" in caplog.text


def test_a_database_that_is_away_for_a_moment_ends_no_job_to_come(
    client: TestClient, web: WebServer, built: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    away: Callable[..., Any] = Jobs.claim
    failures = iter([True])

    def claim(*arguments: Any) -> Any:
        if next(failures, False):
            raise OSError("away")
        return away(*arguments)

    monkeypatch.setattr(built.services.jobs, "claim", lambda *arguments: claim(built.services.jobs, *arguments))
    assert ask(client, f"{web.url}/good.tar.gz", wait_s=PATIENCE_S).status_code == 201
    assert "looking after jobs failed" in caplog.text
