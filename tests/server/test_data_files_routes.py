"""OpenAI's files: uploaded, listed, read, deleted; by whom, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.server.harness import KEYS, World

FILES = "/v1/files"
OFFERED = {"purpose": "fine-tune"}
ROW = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'


def send(client: TestClient, content: bytes = ROW, fields: Mapping[str, str] = OFFERED) -> Any:
    return client.post(FILES, data=dict(fields), files={"file": ("rows.jsonl", content)})


def test_a_file_is_kept_shown_read_and_deleted(client: TestClient) -> None:
    made = send(client).json()
    assert {key: made[key] for key in ("object", "bytes", "filename", "purpose", "status")} == {
        "object": "file",
        "bytes": len(ROW),
        "filename": "rows.jsonl",
        "purpose": "fine-tune",
        "status": "processed",
    }
    assert client.get(f"{FILES}/{made['id']}").json() == made
    assert client.get(f"{FILES}/{made['id']}/content").content == ROW
    assert client.delete(f"{FILES}/{made['id']}").json() == {"id": made["id"], "object": "file", "deleted": True}
    gone = client.get(f"{FILES}/{made['id']}")
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "not_found")


def test_lists_come_in_pages(client: TestClient) -> None:
    ids = [send(client, ROW * count).json()["id"] for count in (1, 2, 3)]
    first = client.get(FILES, params={"limit": 2, "order": "asc", "purpose": "fine-tune"}).json()
    assert (first["object"], first["has_more"]) == ("list", True)
    second = client.get(FILES, params={"limit": 2, "order": "asc", "after": first["last_id"]}).json()
    assert second["has_more"] is False
    assert sorted(ids) == [each["id"] for each in (*first["data"], *second["data"])]
    assert client.get(FILES, params={"purpose": "fine-tune-results"}).json()["data"] == []


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"purpose": "batch"}, "purpose"),
        ({"purpose": ""}, "purpose"),
        ({"expires_after[anchor]": "created_at"}, "expires_after[anchor]"),
    ],
)
def test_what_is_not_offered_is_refused(client: TestClient, fields: dict[str, str], param: str) -> None:
    answer = send(client, fields={**OFFERED, **fields})
    assert answer.status_code == 400
    assert (answer.json()["error"]["param"], answer.json()["error"]["code"]) == (param, "unsupported")


def test_an_empty_file_a_form_without_one_and_another_body_are_refused(client: TestClient, built: World) -> None:
    assert send(client, b"").json()["error"]["code"] == "empty_file"
    nothing = client.post(FILES, files={"purpose": (None, "fine-tune")})
    assert (nothing.status_code, nothing.json()["error"]["param"]) == (400, "file")
    assert client.post(FILES, json={"purpose": "fine-tune"}).json()["error"]["code"] == "unsupported_media_type"
    assert [path for path in (built.settings.data_dir / "files").rglob("*") if path.is_file()] == [
        built.settings.data_dir / "files" / "lock"
    ]


@pytest.mark.parametrize(
    "path", [FILES, f"{FILES}/file-1", "/v1/fine_tuning/jobs", "/v1/fine_tuning/jobs/ftjob-1/events"]
)
def test_only_publishers_see_any_of_it(guarded: TestClient, path: str) -> None:
    answers = {scope: guarded.get(path, headers={"authorization": f"Bearer {KEYS[scope]}"}) for scope in KEYS}
    assert answers["infer"].json()["error"]["code"] == "missing_scope"
    assert {answers["publish"].status_code, answers["admin"].status_code} <= {200, 404}
    assert guarded.get(path).status_code == 401
