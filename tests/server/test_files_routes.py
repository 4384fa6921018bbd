"""What is downloaded is what was uploaded."""

from __future__ import annotations

import hashlib
import io
import tarfile

import pytest
from starlette.testclient import TestClient

from tests.server.harness import Exchange, World, adapter_files, ingest, upload

WEIGHTS = "adapter_model.safetensors"
URL = "/v1/adapters/a/versions/default"


@pytest.fixture
def sent() -> dict[str, bytes]:
    return dict(adapter_files(1).files())


@pytest.fixture
def filled(client: TestClient) -> TestClient:
    upload(client, "a", 1)
    return client


def test_the_list_says_name_size_and_sum(filled: TestClient, sent: dict[str, bytes]) -> None:
    answer = filled.get(f"{URL}/files").json()
    assert answer["version"] == 1
    assert answer["data"] == [
        {"name": name, "size_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in sorted(sent.items())
    ]


def test_a_file_comes_with_its_size_and_its_sum(filled: TestClient, sent: dict[str, bytes]) -> None:
    for name, content in sent.items():
        response = filled.get(f"{URL}/files/{name}")
        assert response.content == content
        assert response.headers["content-length"] == str(len(content))
        assert response.headers["etag"] == f'"{hashlib.sha256(content).hexdigest()}"'
        assert response.headers["content-type"] == "application/octet-stream"


@pytest.mark.parametrize("path", [f"files/{WEIGHTS}", "archive"])
def test_who_has_it_already_gets_nothing(filled: TestClient, path: str) -> None:
    etag = filled.get(f"{URL}/{path}").headers["etag"]
    again = filled.get(f"{URL}/{path}", headers={"if-none-match": etag})
    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", etag)
    assert filled.get(f"{URL}/{path}", headers={"if-none-match": '"another"'}).status_code == 200


@pytest.mark.parametrize("asked", ["bytes=0-9", "bytes=10-", "bytes=-7", "bytes=5-5", "bytes=0-99999999"])
def test_a_part_of_a_file(filled: TestClient, sent: dict[str, bytes], asked: str) -> None:
    content = sent[WEIGHTS]
    start, _, end = asked.removeprefix("bytes=").partition("-")
    expected = content[int(start) :][: int(end) - int(start) + 1 if end else None] if start else content[-int(end) :]
    response = filled.get(f"{URL}/files/{WEIGHTS}", headers={"range": asked})
    assert response.status_code == 206
    assert response.content == expected


@pytest.mark.parametrize("asked", ["lines=0-9", "bytes=x", "bytes=9-1", "bytes=0-1,3-4", "bytes=-", ""])
def test_what_is_no_part_is_ignored(filled: TestClient, sent: dict[str, bytes], asked: str) -> None:
    response = filled.get(f"{URL}/files/{WEIGHTS}", headers={"range": asked})
    assert (response.status_code, response.content) == (200, sent[WEIGHTS])


@pytest.mark.parametrize("asked", ["bytes=99999999-", "bytes=-0"])
def test_a_part_outside_the_file_is_refused_in_our_words(filled: TestClient, asked: str) -> None:
    response = filled.get(f"{URL}/files/{WEIGHTS}", headers={"range": asked})
    assert response.status_code == 416
    assert response.json()["error"]["code"] == "range_not_satisfiable"


def test_the_archive_is_taken_back_as_the_same_version(filled: TestClient, sent: dict[str, bytes]) -> None:
    response = filled.get(f"{URL}/archive")
    assert response.headers["content-length"] == str(len(response.content))
    assert response.headers["content-disposition"] == 'attachment; filename="a-1.tar"'
    assert response.content == filled.get("/v1/adapters/a/versions/1/archive").content
    with tarfile.open(fileobj=io.BytesIO(response.content)) as archive:
        assert archive.getnames() == sorted(sent)
    again = filled.post("/v1/adapters", data={"name": "a"}, files={"files": ("a.tar", response.content)})
    assert (again.status_code, again.json()["version"]) == (200, 1)


@pytest.mark.parametrize(
    "path",
    ["a/versions/2/files", "b/versions/1/files", "a/versions/1/files/x", "a/versions/1/files/..%2f..%2fregistry.db"],
)
def test_what_is_not_there(filled: TestClient, path: str) -> None:
    assert filled.get(f"/v1/adapters/{path}").status_code == 404


async def test_a_client_that_leaves_in_the_middle_of_an_archive_leaves_nothing_open(built: World) -> None:
    async with built.running():
        ingest(built, "a", 1)
        exchange = Exchange(built.app, f"{URL}/archive", {}, method="GET")
        answering = exchange.start()
        await exchange.heard()
        exchange.leave()
        await answering
