"""Merges over HTTP, with a merging process that measures nothing."""

from __future__ import annotations

import time
from typing import Any

import pytest
from sqlalchemy import delete
from starlette.testclient import TestClient

from adapters import schema
from server import merging
from tests.server.harness import PATIENCE_S, World, until_let_go, upload

MERGES = "/v1/merges"


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "WORKER", "tests.server.stand_in_merger")


def done(client: TestClient, body: dict[str, Any]) -> dict[str, Any]:
    response = client.post(MERGES, json=body)
    assert response.status_code == 202, response.text
    deadline = time.monotonic() + PATIENCE_S
    while (job := client.get(response.headers["location"]).json())["ended_at"] is None:
        assert time.monotonic() < deadline, job
        time.sleep(0.02)
    until_let_go(client, job["id"])
    return dict(job)


def test_a_merge_of_one_adapter_is_an_export_and_twice_the_same(client: TestClient, built: World) -> None:
    upload(client, "sea")
    job = done(client, {"adapter": "sea", "base": "original", "dtype": "float16"})
    assert (job["kind"], job["state"]) == ("export", "succeeded")
    assert (job["result"]["name"], job["result"]["version"]) == ("sea", 1)
    export = client.get(f"/v1/exports/{job['result']['export']}").json()
    assert (export["format"], export["options"]) == ("hf", {"base": "original", "outtype": "f16"})
    assert export["report"]["fidelity"] == job["result"]["fidelity"]
    again = done(client, {"adapter": "sea@1", "base": "original", "dtype": "float16"})
    assert again["id"] == job["id"]
    with built.services.registry.database.write() as connection:  # as a thousand later jobs would
        for table in (schema.job_events, schema.jobs):
            connection.execute(delete(table))
    anew = done(client, {"adapter": "sea@1", "base": "original", "dtype": "float16"})
    assert (anew["id"] == job["id"], anew["result"]) == (False, job["result"])
    assert client.get(f"/v1/exports/{export['id']}").json()["files"] == export["files"]


def test_several_adapters_become_a_version_with_its_parents(client: TestClient, built: World) -> None:
    first, second = upload(client, "sea"), upload(client, "sky", seed=1)
    parts = [{"model": "sea", "weight": 0.75}, {"model": "sky@1", "weight": 0.25}]
    asked = {"adapters": parts, "method": "linear", "into": {"name": "both", "tags": {"team": "blue"}}}
    job = done(client, asked)
    assert job["state"] == "succeeded", job
    assert (job["result"]["name"], job["result"]["version"], job["result"]["created"]) == ("both", 1, True)
    assert job["result"]["composition"]["weights"] == [0.75, 0.25]
    version = client.get("/v1/adapters/both/versions/1").json()
    assert (version["state"], version["tags"]) == ("ready", {"team": "blue"})
    assert version["manifest"]["lineage"]["parents"] == [first["digest"], second["digest"]]
    assert [parent["href"] for parent in version["parents"]] == [
        "/v1/adapters/sea/versions/1",
        "/v1/adapters/sky/versions/1",
    ]
    assert done(client, asked)["result"]["created"] is False
    assert sorted(path.name for path in (built.settings.data_dir / "merging").iterdir()) == ["attempts"]


def test_a_version_that_was_not_merged_has_no_report(refusing: TestClient) -> None:
    response = refusing.get("/v1/adapters/good/versions/1/fidelity")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "not_found")
    assert refusing.get("/v1/adapters/good/versions/1").json()["fidelity"] is None


@pytest.mark.parametrize(
    ("body", "status", "word"),
    [
        ({}, 400, "either `adapter`"),
        ({"adapter": "good", "adapters": [{"model": "good"}, {"model": "good"}]}, 400, "either `adapter`"),
        ({"adapter": "good", "into": {"name": "new"}}, 400, "into is for several"),
        ({"adapters": [{"model": "good"}, {"model": "good"}]}, 400, "into.name"),
        ({"adapters": [{"model": "good"}], "into": {"name": "new"}}, 400, "two or more"),
        ({"adapters": [{"model": "good"}] * 2, "into": {"name": "new"}, "base": "original"}, 400, "base is for one"),
        ({"adapters": [{"model": "good"}, {"model": "none"}], "into": {"name": "new"}}, 404, "none"),
        ({"adapters": [{"model": "good"}] * 2, "into": {"name": "no/name"}}, 422, "no/name"),
        ({"adapters": [{"model": "good"}] * 2, "into": {"name": "new"}, "method": "ties"}, 400, "density"),
        ({"adapters": [{"model": "good"}] * 2, "into": {"name": "new"}, "method": "magic"}, 400, "method"),
        ({"adapter": "good", "dtype": "int8"}, 400, "dtype"),
    ],
)
def test_what_is_known_to_be_wrong_is_refused_at_once(
    refusing: TestClient, body: dict[str, Any], status: int, word: str
) -> None:
    response = refusing.post(MERGES, json=body)
    assert response.status_code == status, response.text
    assert word in response.json()["error"]["message"]
    assert [job for job in refusing.get("/v1/jobs").json()["data"] if job["kind"] == "merge"] == []
