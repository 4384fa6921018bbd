"""One version over HTTP: its tags, its lineage, its model card."""

from __future__ import annotations

import json
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.adapters.factories import AdapterFiles
from tests.server.harness import adapter_files, as_parts, upload

ADAPTERS = "/v1/adapters"


def test_tags_come_with_an_upload_and_change_later(client: TestClient) -> None:
    assert upload(client, "a", 1, tags='{"team": "search", "stage": "new"}')["tags"] == {
        "stage": "new",
        "team": "search",
    }
    changes = {"tags": {"stage": "prod", "team": None, "ticket": "LP-7"}}
    changed = client.patch(f"{ADAPTERS}/a/versions/1", json=changes).json()
    assert changed["tags"] == {"stage": "prod", "ticket": "LP-7"}
    edit = {"tags": {"owner": "ann"}, "description": "of the search team"}
    adapter = client.patch(f"{ADAPTERS}/a", json=edit).json()
    assert (adapter["tags"], adapter["description"]) == ({"owner": "ann"}, "of the search team")
    assert adapter["versions"][0]["tags"] == changed["tags"]
    assert client.patch(f"{ADAPTERS}/a", json={"description": None}).json()["description"] is None
    assert client.get(f"{ADAPTERS}/a").json()["tags"] == {"owner": "ann"}


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("good", {"tags": {"a b": "c"}}, 422),
        ("good", {"tags": {"a": 7}}, 400),
        ("good", {"name": "better"}, 400),
        ("good", {"description": "x" * 4001}, 422),
        ("good/versions/1", {"description": "of a version"}, 400),
        ("good/versions/0", {"tags": {"a": "b"}}, 400),
        ("good/versions/2", {"tags": {"a": "b"}}, 404),
        ("bad", {"tags": {"a": "b"}}, 404),
    ],
)
def test_an_edit_that_cannot_be(refusing: TestClient, path: str, body: dict[str, Any], status: int) -> None:
    assert refusing.patch(f"{ADAPTERS}/{path}", json=body).status_code == status


@pytest.mark.parametrize(
    ("field", "value", "status", "code"),
    [
        ("tags", "{", 400, "bad_request"),
        ("tags", "[]", 400, "bad_request"),
        ("tags", '{"a": 7}', 400, "bad_request"),
        ("tags", '{"a b": "c"}', 422, "bad_tags"),
        ("lineage", '{"x": NaN}', 422, "bad_lineage"),
        ("lineage", '{"x": 1e999}', 422, "bad_lineage"),
        ("lineage", '{"x": "\\ud800"}', 422, "bad_lineage"),
        ("lineage", '{"x":' + "[" * 100_000, 400, "bad_request"),
        ("lineage", '{"parents": ["nobody@1"]}', 422, "bad_lineage"),
    ],
)
def test_a_field_that_cannot_be(refusing: TestClient, field: str, value: str, status: int, code: str) -> None:
    parts = as_parts(adapter_files(7).files())
    response = refusing.post(ADAPTERS, data={"name": "a", field: value}, files=parts)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)


def test_parents_are_links(client: TestClient) -> None:
    first = upload(client, "a", 1)
    foreign = "sha256:" + "7" * 64
    lineage = {"parents": ["a@1", first["digest"], foreign], "run": "r7"}
    shown = upload(client, "b", 2, lineage=json.dumps(lineage))
    assert shown["manifest"]["lineage"] == lineage
    href = "/v1/adapters/a/versions/1"
    assert shown["parents"] == [
        {"parent": "a@1", "href": href},
        {"parent": first["digest"], "href": href},
        {"parent": foreign, "href": None},
    ]
    assert client.get(href).json()["digest"] == first["digest"]


def test_a_card_is_the_readme(client: TestClient) -> None:
    readme = "# Ahoy\n\n<script>alert('£')</script>\n"
    files = AdapterFiles(extra={"README.md": readme.encode()}).files()
    client.post(ADAPTERS, data={"name": "a"}, files=as_parts(files))
    response = client.get(f"{ADAPTERS}/a/versions/default/card")
    assert response.text == readme
    assert response.headers["content-type"] == "text/markdown; charset=utf-8"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert "sandbox" in response.headers["content-security-policy"]


def test_a_card_is_made_where_none_came(client: TestClient) -> None:
    upload(client, "a", 1, tags='{"team": "search"}')
    response = client.get(f"{ADAPTERS}/a/versions/1/card")
    assert response.text.startswith("# a@1\n")
    assert "| `team` | `search` |" in response.text
    assert response.headers["content-type"] == "text/markdown; charset=utf-8"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert client.get(f"{ADAPTERS}/a/versions/2/card").status_code == 404
