"""ETags: the rules alone, then what a client sees."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.testclient import TestClient

from server.etags import etag_of, expected_revisions, is_unchanged
from tests.server.harness import chat, upload

ADAPTERS = "/v1/adapters"


@pytest.mark.parametrize(
    ("header", "unchanged"),
    [
        (None, False),
        ("", False),
        ("nonsense", False),
        ("*", True),
        ('"a"', False),
        ('"7-abc"', True),
        ('W/"7-abc"', True),
        ('"a", W/"7-abc" , "b"', True),
        ('"7"', False),
        ("7-abc", False),
    ],
)
def test_if_none_match(header: str | None, unchanged: bool) -> None:
    assert is_unchanged(header, '"7-abc"') is unchanged


@pytest.mark.parametrize(
    ("header", "revisions"),
    [
        (None, None),
        ("*", None),
        ("", set()),
        ("nonsense", set()),
        ('"7-abc"', {7}),
        ('"7"', {7}),
        ('W/"7-abc"', set()),
        ('"7-abc", "8"', {7, 8}),
        ('"abc"', set()),
        ('"' + "9" * 30 + '"', set()),
    ],
)
def test_if_match(header: str | None, revisions: set[int] | None) -> None:
    assert expected_revisions(header) == revisions


def test_an_etag_is_of_the_bytes() -> None:
    assert etag_of(b"x", 7) == etag_of(b"x", 7)
    assert len({etag_of(b"x", 7), etag_of(b"y", 7), etag_of(b"x", 8), etag_of(b"x")}) == 4


PATHS = [
    ADAPTERS,
    f"{ADAPTERS}?summary=true&state=ready",
    f"{ADAPTERS}/good",
    f"{ADAPTERS}/good?summary=true",
    f"{ADAPTERS}/good/versions",
    f"{ADAPTERS}/good/versions/1",
    f"{ADAPTERS}/good/aliases/default",
    "/v1/models",
]


@pytest.mark.parametrize("path", PATHS)
def test_an_answer_that_has_not_changed_is_304(refusing: TestClient, path: str) -> None:
    first = refusing.get(path)
    assert first.status_code == 200
    etag = first.headers["etag"]
    assert first.headers["cache-control"] == "private, no-cache"
    again = refusing.get(path, headers={"if-none-match": f'"other", W/{etag}'})
    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", etag)
    assert refusing.get(path, headers={"if-none-match": '"other"'}).json() == first.json()


def test_an_answer_that_has_changed_is_not(client: TestClient) -> None:
    upload(client, "good")
    etags = {path: client.get(path).headers["etag"] for path in PATHS if path != "/v1/models"}
    client.patch(f"{ADAPTERS}/good", json={"tags": {"x": "y"}})
    for path, etag in etags.items():
        changed = client.get(path, headers={"if-none-match": etag})
        assert (changed.status_code, changed.headers["etag"] != etag) == (200, True), path


def test_what_the_engine_does_changes_the_answer_but_is_no_change_of_the_adapter(client: TestClient) -> None:
    upload(client, "a")
    seen = client.get(f"{ADAPTERS}/a").headers["etag"]
    client.post("/v1/chat/completions", json=chat("a"))
    assert client.get(f"{ADAPTERS}/a", headers={"if-none-match": seen}).status_code == 200
    moved = client.put(f"{ADAPTERS}/a/aliases/blue", json={"version": 1}, headers={"if-match": seen})
    assert moved.status_code == 200
    assert moved.headers["etag"] == client.get(f"{ADAPTERS}/a").headers["etag"]


CHANGES: list[tuple[str, str, Any]] = [
    ("PUT", "/a/aliases/blue", {"version": 1}),
    ("DELETE", "/a/aliases/green", None),
    ("POST", "/a/rollback", {"alias": "default"}),
    ("PATCH", "/a", {"description": "new"}),
    ("PATCH", "/a/versions/1", {"tags": {"x": "y"}}),
]


@pytest.mark.parametrize(("method", "path", "body"), CHANGES, ids=lambda value: str(value))
def test_a_change_of_what_has_changed_meanwhile_is_412(client: TestClient, method: str, path: str, body: Any) -> None:
    for seed in (1, 2):
        upload(client, "a", seed)
    client.put(f"{ADAPTERS}/a/aliases/green", json={"version": 1})
    seen = client.get(f"{ADAPTERS}/a/aliases/default").headers["etag"]
    upload(client, "a", 3, promote="false")
    now = client.get(f"{ADAPTERS}/a").json()
    stale = client.request(method, ADAPTERS + path, json=body, headers={"if-match": seen})
    assert (stale.status_code, stale.json()["error"]["code"]) == (412, "precondition_failed")
    assert "read it again" in stale.json()["error"]["message"]
    assert client.get(f"{ADAPTERS}/a").json() == now
    fresh = client.get(f"{ADAPTERS}/a/versions/1").headers["etag"]
    assert client.request(method, ADAPTERS + path, json=body, headers={"if-match": fresh}).status_code == 200


def test_a_list_is_filtered_summed_up_and_paged(client: TestClient) -> None:
    for name, seed, tags in (("a", 1, '{"t": "1"}'), ("a", 2, '{"t": "2"}'), ("b", 3, '{"t": "2"}'), ("c", 4, "{}")):
        upload(client, name, seed, tags=tags)
    client.post("/v1/chat/completions", json=chat("a"))

    def names(**params: Any) -> list[str]:
        return [each["name"] for each in client.get(ADAPTERS, params=params).json()["data"]]

    assert names(tag="t=2") == ["a", "b"]
    assert names(tag=["t=2", "t=1"]) == ["a"]
    assert names(tag="t=2", after="a") == ["b"]
    assert names(name="c*") == ["c"]
    assert names(state="draining") == []
    page = client.get(ADAPTERS, params={"tag": "t", "summary": True, "limit": 1}).json()
    assert (page["has_more"], page["last_id"]) == (True, "a")
    summary = page["data"][0]
    assert "versions" not in summary
    assert {key: summary[key] for key in ("version_count", "states", "latest", "resident", "aliases")} == {
        "version_count": 2,
        "states": {"ready": 2},
        "latest": 2,
        "resident": 1,
        "aliases": {"default": 2},
    }
    assert client.get(f"{ADAPTERS}/a?summary=true").json() == summary
    versions = client.get(f"{ADAPTERS}/a/versions", params={"limit": 1}).json()
    assert ([each["version"] for each in versions["data"]], versions["has_more"], versions["last_id"]) == ([1], True, 1)
    assert [each["version"] for each in client.get(f"{ADAPTERS}/a/versions?tag=t=2").json()["data"]] == [2]
    assert versions["data"] == client.get(f"{ADAPTERS}/a").json()["versions"][:1]


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ("tag=a%20b", 422),
        ("tag=a=%00", 422),
        ("state=%00", 400),
        ("name=%00", 400),
        ("after=%00", 400),
        ("limit=0", 400),
    ],
)
def test_a_question_that_cannot_be(refusing: TestClient, query: str, status: int) -> None:
    assert refusing.get(f"{ADAPTERS}?{query}").status_code == status
