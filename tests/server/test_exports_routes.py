"""Exports, with a merging process that measures nothing: asked for, followed, killed, downloaded in parts, deleted."""

from __future__ import annotations

import hashlib
import io
import os
import signal
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from adapters.errors import NotTheSame
from adapters.merge.report import FidelityReport
from server import exports, merging
from server.merge_fields import ExportFields
from tests.server.conftest import wait_until_ready
from tests.server.harness import PATIENCE_S, World, ingest, until_let_go, upload, world

EXPORTS = "/v1/exports"
WEIGHTS = "model.safetensors"


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "WORKER", "tests.server.stand_in_merger")


@pytest.fixture
def control(built: World) -> Callable[..., None]:
    directory = built.settings.data_dir / "control"
    directory.mkdir()

    def make(name: str, text: str = "") -> None:
        (directory / name).write_text(text)

    return make


def ask(client: TestClient, adapter: str = "sea", **fields: Any) -> Any:
    return client.post(EXPORTS, json={"adapter": adapter, "format": "hf", "base": "original", **fields})


def until(client: TestClient, export_id: str, reached: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    deadline = time.monotonic() + PATIENCE_S
    while not reached(export := client.get(f"{EXPORTS}/{export_id}").json()):
        assert time.monotonic() < deadline, export
        time.sleep(0.02)
    if ended(export):
        until_let_go(client, export["job"]["id"])
    return dict(export)


def ended(export: dict[str, Any]) -> bool:
    return export["state"] in ("ready", "failed", "cancelled")


def made(client: TestClient, **fields: Any) -> dict[str, Any]:
    return until(client, ask(client, **fields).json()["id"], ended)


def begun(export: dict[str, Any]) -> bool:
    return bool(export["job"]["progress"].get("bytes"))


def attempts(built: World) -> list[int]:
    return [int(line) for line in (built.settings.data_dir / "merging" / "attempts").read_text().split()]


def left(built: World) -> list[str]:
    """Names of what lies in the two directories, but for what the stand-in writes."""
    roots = (built.settings.data_dir / "merging", built.settings.data_dir / "exports")
    return sorted(path.name for root in roots if root.exists() for path in root.iterdir() if path.name != "attempts")


def test_an_export_is_asked_for_made_and_downloaded(client: TestClient, built: World) -> None:
    upload(client, "sea")
    answer = ask(client)
    asked = answer.json()
    assert (answer.status_code, answer.headers["location"]) == (202, f"{EXPORTS}/{asked['id']}")
    assert (asked["adapter"], asked["format"], asked["created"]) == ("sea@1", "hf", True)
    assert asked["state"] in ("queued", "running")
    export = until(client, asked["id"], ended)
    assert export["state"] == "ready", export
    assert export["options"] == {"base": "original", "outtype": "bf16"}
    assert export["expires_at"] - export["ready_at"] == 604800
    assert export["report"]["fidelity"]["task"]["kl"] == 0.001
    assert {"config.json", WEIGHTS, "SHA256SUMS", "README.md"} <= {file["name"] for file in export["files"]}
    assert export["size_bytes"] == sum(file["size_bytes"] for file in export["files"])
    for file in export["files"]:
        response = client.get(file["href"])
        assert len(response.content) == file["size_bytes"]
        assert hashlib.sha256(response.content).hexdigest() == file["sha256"] == response.headers["x-checksum-sha256"]
    with tarfile.open(fileobj=io.BytesIO(client.get(f"{EXPORTS}/{asked['id']}/archive").content)) as tar:
        assert sorted(tar.getnames()) == sorted(file["name"] for file in export["files"])
    assert left(built) == [asked["id"], f"{asked['id']}.json"]
    again = ask(client)
    assert (again.status_code, again.json()["created"], again.json()["files"]) == (200, False, export["files"])
    (listed,) = client.get(EXPORTS).json()["data"]
    assert listed["id"] == asked["id"]
    assert export["report"].keys() - listed["report"].keys() == {"report"}
    assert len(attempts(built)) == 1
    kept = client.get("/v1/adapters/sea/versions/1/fidelity").json()
    assert (kept["summary"], kept["report"]["judged"]) == (
        export["report"]["fidelity"],
        "merged, original, bfloat16",
    )
    assert client.get("/v1/adapters/sea/versions/1").json()["fidelity"] == kept["summary"]


def test_a_part_of_a_file_is_answered_as_long_as_it_is_the_same_file(client: TestClient) -> None:
    upload(client, "sea")
    file = next(file for file in made(client)["files"] if file["name"] == WEIGHTS)
    size, etag = file["size_bytes"], f'"{file["sha256"]}"'
    whole = client.get(file["href"]).content
    head = client.head(file["href"])
    assert (head.status_code, int(head.headers["content-length"]), head.content) == (200, size, b"")
    assert (head.headers["etag"], head.headers["accept-ranges"]) == (etag, "bytes")
    rest = client.get(file["href"], headers={"range": "bytes=100-", "if-range": etag})
    assert (rest.status_code, rest.content) == (206, whole[100:])
    assert rest.headers["content-range"] == f"bytes 100-{size - 1}/{size}"
    assert rest.headers["x-checksum-sha256"] == file["sha256"]
    changed = client.get(file["href"], headers={"range": "bytes=100-", "if-range": '"other"'})
    assert (changed.status_code, changed.content) == (200, whole)
    outside = client.get(file["href"], headers={"range": f"bytes={size}-"})
    assert (outside.status_code, outside.json()["error"]["code"]) == (416, "range_not_satisfiable")
    assert client.get(file["href"], headers={"if-none-match": etag}).status_code == 304
    assert client.get(f"{file['href']}x").status_code == 404


def test_after_kill_9_the_same_bytes(client: TestClient, built: World, control: Callable[..., None]) -> None:
    upload(client, "sea")
    expected = made(client)["files"]
    client.delete(f"{EXPORTS}/{ask(client).json()['id']}")
    control("hold")
    export = until(client, ask(client).json()["id"], begun)
    os.kill(attempts(built)[-1], signal.SIGKILL)
    until(client, export["id"], lambda export: export["job"]["attempts"] == 2)
    (built.settings.data_dir / "control/hold").unlink()
    assert until(client, export["id"], ended)["files"] == expected
    messages = [each["message"] for each in client.get(f"/v1/jobs/{export['job']['id']}/events").json()["data"]]
    assert "the merging process ended with SIGKILL; queued again" in messages


def test_what_a_stop_interrupts_the_next_start_takes_up(
    tiny_base: Path, tmp_path: Path, built: World, control: Callable[..., None]
) -> None:
    control("hold")
    with built.client() as client:
        wait_until_ready(client)
        upload(client, "sea")
        export = until(client, ask(client).json()["id"], begun)
    (built.settings.data_dir / "control/hold").unlink()
    with world(tiny_base, tmp_path / "data").client() as client:
        wait_until_ready(client)
        found = until(client, export["id"], ended)
        assert (found["state"], found["job"]["id"]) == ("ready", export["job"]["id"])
    assert len(attempts(built)) == 2


def test_cancelled_it_leaves_nothing_and_can_be_asked_for_again(
    client: TestClient, built: World, control: Callable[..., None]
) -> None:
    upload(client, "sea")
    control("hold")
    export = until(client, ask(client).json()["id"], begun)
    assert client.get(f"{EXPORTS}/{export['id']}/files/{WEIGHTS}").json()["error"]["code"] == "export_not_ready"
    client.post(f"/v1/jobs/{export['job']['id']}/cancel")
    assert until(client, export["id"], ended)["state"] == "cancelled"
    assert left(built) == [f"{export['id']}.json"]
    (built.settings.data_dir / "control/hold").unlink()
    again = ask(client).json()
    assert (again["id"], again["created"]) == (export["id"], True)
    assert until(client, export["id"], ended)["state"] == "ready"


def test_a_version_that_is_exported_cannot_be_deleted_meanwhile(
    client: TestClient, control: Callable[..., None]
) -> None:
    upload(client, "sea")
    upload(client, "sea", seed=1)
    control("hold")
    export = until(client, ask(client, "sea@1").json()["id"], begun)
    for path in ("/v1/adapters/sea/versions/1", "/v1/adapters/sea"):
        refused = client.delete(path).json()["error"]
        assert (refused["code"], export["job"]["id"] in refused["message"]) == ("version_in_use", True)
    assert client.post("/v1/adapters/gc", json={"keep": 1}).json()["deleted"] == []
    deleted = client.delete(f"{EXPORTS}/{export['id']}").json()
    assert deleted == {"id": export["id"], "object": "export.deleted", "deleted": True}
    deadline = time.monotonic() + PATIENCE_S
    while (gone := client.delete("/v1/adapters/sea/versions/1")).status_code == 409:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert gone.json()["deleted"] is True
    assert client.get(f"{EXPORTS}/{export['id']}").status_code == 404


def test_what_loses_too_much_is_refused_unless_the_loss_is_accepted(
    client: TestClient, built: World, control: Callable[..., None]
) -> None:
    upload(client, "sea")
    control("kl", "0.5")
    refused = made(client)
    assert (refused["state"], refused["job"]["error"]["code"], refused["job"]["error"]["status"]) == (
        "failed",
        "unfaithful_merge",
        422,
    )
    assert "KL to the adapter on task is 0.5000" in refused["job"]["error"]["message"]
    progress = client.get(f"/v1/jobs/{refused['job']['id']}").json()["progress"]
    assert (progress["stage"], progress["fidelity"]["task"]["kl"]) == ("measured", 0.5)
    assert FidelityReport.from_json(progress["report"]).wanted.task.kl == 0.5
    assert left(built) == [f"{refused['id']}.json"]
    taken = made(client, accept_loss=True)
    assert (taken["id"], taken["state"]) == (refused["id"], "ready")
    assert taken["report"]["fidelity"]["within_budget"] is False
    another = ask(client)
    assert (another.status_code, another.json()["error"]["code"]) == (422, "unfaithful_merge")
    assert ask(client, max_kl=0.6).json()["id"] == taken["id"]


@pytest.mark.parametrize("format_", ["gguf", "gguf-lora"])
def test_that_it_reads_otherwise_is_accepted_by_a_word_of_its_own(format_: Any) -> None:
    proof = ExportFields(adapter="sea", format=format_, accept_differences=True).proof(16)
    assert (proof.accept_loss, proof.accept_differences, proof.tokens) == (False, True, 16)


@pytest.mark.parametrize(
    ("accepted", "accepts", "taken"),
    [
        ({}, {}, True),
        ({"loss": "far"}, {}, False),
        ({"loss": "far"}, {"accept_differences": True}, False),
        ({"loss": "far"}, {"accept_loss": True}, True),
        ({"differences": "otherwise"}, {"accept_loss": True}, False),
        ({"differences": "otherwise"}, {"accept_differences": True}, True),
    ],
)
def test_what_one_caller_accepted_of_an_export_is_not_accepted_for_another(
    built: World, accepted: dict[str, str], accepts: dict[str, Any], taken: bool
) -> None:
    """Of a server that is not started: nothing is made."""
    ingest(built, "sea")
    exports, fields = built.services.exports, ExportFields(adapter="sea", format="gguf", **accepts)
    asked, _ = exports.ask(fields, "somebody")
    exports._store.keep(replace(asked, ready_at=1, report={"export": {"accepted": accepted}}))
    if taken:
        assert exports.ask(fields, "another") == (exports.export(asked.id), False)
    else:
        with pytest.raises(NotTheSame, match=next(iter(accepted.values()))):
            exports.ask(fields, "another")


def sent(client: TestClient, rows: bytes) -> str:
    form: dict[str, Any] = {"files": {"file": ("rows.jsonl", rows)}, "data": {"purpose": "fine-tune"}}
    return str(client.post("/v1/files", **form).json()["id"])


def test_the_same_rows_are_the_same_export_whatever_their_file_is_called(client: TestClient, built: World) -> None:
    upload(client, "sea")
    mine, again, others = (sent(client, rows) for rows in (b"my rows", b"my rows", b"others"))
    first = ask(client, validation_file=mine).json()
    assert ask(client, validation_file=again).json()["id"] == first["id"]
    assert (
        len({ask(client, **fields).json()["id"] for fields in ({}, {"validation_file": others})} | {first["id"]}) == 3
    )
    for export in client.get(EXPORTS).json()["data"]:
        client.delete(f"{EXPORTS}/{export['id']}")


def test_it_is_measured_on_the_rows_that_are_given(
    client: TestClient, built: World, control: Callable[..., None]
) -> None:
    upload(client, "sea")
    file = sent(client, b"my rows")
    control("hold")
    export = until(client, ask(client, validation_file=file).json()["id"], begun)
    client.delete(f"/v1/files/{file}")
    os.kill(attempts(built)[-1], signal.SIGKILL)
    until(client, export["id"], lambda export: export["job"]["attempts"] == 2)
    (built.settings.data_dir / "control/hold").unlink()
    ready = until(client, export["id"], ended)
    assert (ready["state"], ready["options"]["validation_file"]) == ("ready", file)
    assert ready["report"]["fidelity"]["probes"] == "my rows"
    assert made(client)["report"]["fidelity"]["probes"] == "a test"
    refused = ask(client, validation_file=file)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "validation_file")


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"adapter": "none"}, 404, None),
        ({"adapter": "good@7"}, 404, None),
        ({"format": "onnx"}, 400, "format"),
        ({"outtype": "q8_0"}, 400, None),
        ({"format": "gguf-lora"}, 400, None),
        ({"format": "nf4", "outtype": "bf16"}, 400, None),
        ({"max_kl": -1}, 400, "max_kl"),
        ({"validation_file": "file-1"}, 400, "validation_file"),
        ({"accept_differences": True}, 400, None),
        ({"colour": "red"}, 400, "colour"),
    ],
)
def test_what_is_known_to_be_wrong_is_refused_at_once(
    refusing: TestClient, fields: dict[str, Any], status: int, param: str | None
) -> None:
    response = refusing.post(EXPORTS, json={"adapter": "good", "format": "hf", "base": "original", **fields})
    assert (response.status_code, response.json()["error"]["param"]) == (status, param), response.text
    assert refusing.get(EXPORTS).json()["data"] == []


def test_one_that_would_not_fit_is_refused(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with world(tiny_base, tmp_path / "data", max_export_bytes=1000).client() as client:
        wait_until_ready(client)
        upload(client, "sea")
        refused = ask(client)
        assert (refused.status_code, refused.json()["error"]["code"]) == (507, "insufficient_storage")
        assert "max_export_bytes" in refused.json()["error"]["message"]
    with world(tiny_base, tmp_path / "data").client() as client:
        wait_until_ready(client)
        monkeypatch.setattr(exports, "RESERVE_BYTES", 1 << 60)
        assert "make room in data_dir" in ask(client).json()["error"]["message"]


def test_where_merging_is_off_it_says_so(tiny_base: Path, tmp_path: Path) -> None:
    with world(tiny_base, tmp_path / "data", merging=False).client() as client:
        for path in (EXPORTS, "/v1/merges"):
            body = {"adapter": "sea"} | ({"format": "hf"} if path == EXPORTS else {})
            refused = client.post(path, json=body)
            assert (refused.status_code, refused.json()["error"]["code"]) == (403, "merging_off")


@pytest.fixture
def short_lived(tiny_base: Path, tmp_path: Path) -> Iterator[tuple[World, TestClient]]:
    built = world(tiny_base, tmp_path / "data", export_kept_s=0.5)
    with built.client() as client:
        wait_until_ready(client)
        yield built, client


def test_it_goes_when_its_time_has_come(short_lived: tuple[World, TestClient]) -> None:
    built, client = short_lived
    upload(client, "sea")
    asked = ask(client).json()
    export_id = asked["id"]
    deadline = time.monotonic() + PATIENCE_S
    while client.get(f"{EXPORTS}/{export_id}").status_code != 404:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    until_let_go(client, asked["job"]["id"])
    assert left(built) == []
