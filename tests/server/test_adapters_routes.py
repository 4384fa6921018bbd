from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from adapters.errors import StoreError
from tests.adapters.factories import MODULES, AdapterFiles, lora_config, lora_tensors, safetensors, tar, tensor
from tests.server.harness import Exchange, World, adapter_files, as_parts, chat, ingest, said, until, upload, world

ADAPTERS = "/v1/adapters"


def test_an_upload_is_a_new_version(client: TestClient) -> None:
    response = client.post(ADAPTERS, data={"name": "a"}, files=as_parts(adapter_files().files()))
    assert response.status_code == 201
    assert response.headers["location"] == "/v1/adapters/a/versions/1"
    shown = response.json()
    assert shown["manifest"]["rank"] == 4
    assert shown["manifest"]["digest"] == shown["digest"]
    assert {key: shown[key] for key in ("name", "version", "state", "aliases", "created", "resident", "leases")} == {
        "name": "a",
        "version": 1,
        "state": "ready",
        "aliases": ["default"],
        "created": True,
        "resident": False,
        "leases": 0,
    }


@pytest.mark.parametrize("mode", ["w:gz", "w:"])
def test_an_archive_is_the_same_adapter_as_its_files(client: TestClient, mode: str) -> None:
    files = adapter_files().files()
    name = "adapter.tar.gz" if mode == "w:gz" else "adapter.tar"
    packed = client.post(ADAPTERS, data={"name": "a"}, files={"file": (name, tar(files, mode))})
    assert packed.status_code == 201, packed.text
    assert upload(client, "b")["digest"] == packed.json()["digest"]


def test_the_same_bytes_twice_are_one_version(client: TestClient, built: World) -> None:
    first = upload(client, "a")
    stored = built.stored()
    response = client.post(ADAPTERS, data={"name": "a"}, files=as_parts(adapter_files().files()))
    assert response.status_code == 200
    assert response.json()["created"] is False
    assert response.json()["version"] == first["version"]
    assert built.stored() == stored


def test_a_new_version_is_served_at_once_unless_it_is_not_promoted(client: TestClient) -> None:
    upload(client, "a", 1)
    second = upload(client, "a", 2, promote="false")
    assert second["aliases"] == []
    assert client.post("/v1/chat/completions", json=chat("a")).headers["x-loraplex-version"] == "1"
    upload(client, "a", 3)
    assert client.post("/v1/chat/completions", json=chat("a")).headers["x-loraplex-version"] == "3"


def test_list_and_show(client: TestClient) -> None:
    upload(client, "b", 1, description="the first")
    upload(client, "a", 2)
    upload(client, "a", 3)
    client.post("/v1/chat/completions", json=chat("a@2"))
    listed = client.get(ADAPTERS).json()["data"]
    assert [adapter["name"] for adapter in listed] == ["a", "b"]
    shown = client.get(f"{ADAPTERS}/a").json()
    assert shown == listed[0]
    assert shown["aliases"] == {"default": 2}
    assert [(item["version"], item["aliases"], item["resident"]) for item in shown["versions"]] == [
        (1, [], False),
        (2, ["default"], True),
    ]
    assert client.get(f"{ADAPTERS}/b").json()["description"] == "the first"


@pytest.mark.parametrize("ref", ["1", "default", "latest"])
def test_one_version_by_any_reference(refusing: TestClient, ref: str) -> None:
    shown = refusing.get(f"{ADAPTERS}/good/versions/{ref}").json()
    assert (shown["name"], shown["version"]) == ("good", 1)
    assert refusing.get(f"{ADAPTERS}/good/versions/{shown['digest']}").json() == shown


def test_an_alias_moves_traffic(client: TestClient) -> None:
    digests = [upload(client, "a", seed)["digest"] for seed in (1, 2)]
    assert client.put(f"{ADAPTERS}/a/aliases/default", json={"version": 1}).json()["aliases"] == {"default": 1}
    assert f"[a@{digests[0][7:19]}]" in said(client.post("/v1/chat/completions", json=chat("a")).json())


def test_an_alias_comes_and_goes(client: TestClient) -> None:
    upload(client, "a")
    assert client.put(f"{ADAPTERS}/a/aliases/blue", json={"version": 1}).status_code == 200
    assert client.delete(f"{ADAPTERS}/a/aliases/blue").json()["aliases"] == {"default": 1}
    assert client.delete(f"{ADAPTERS}/a/aliases/blue").status_code == 404
    assert client.post("/v1/chat/completions", json=chat("a@blue")).status_code == 404


@pytest.mark.parametrize(
    ("alias", "version", "status"),
    [("blue", 9, 404), ("latest", 1, 422), ("7", 1, 422), ("sha256:00", 1, 422), ("default", "x", 400)],
)
def test_an_alias_that_cannot_be(refusing: TestClient, alias: str, version: Any, status: int) -> None:
    assert refusing.put(f"{ADAPTERS}/good/aliases/{alias}", json={"version": version}).status_code == status


def test_the_default_alias_cannot_be_removed(refusing: TestClient) -> None:
    assert refusing.delete(f"{ADAPTERS}/good/aliases/default").status_code == 409


def test_a_deleted_adapter_is_gone_everywhere(client: TestClient, built: World) -> None:
    empty = built.stored()
    for seed in (1, 2):
        upload(client, "a", seed)
        client.post("/v1/chat/completions", json=chat("a"))
    response = client.delete(f"{ADAPTERS}/a")
    assert response.status_code == 200
    assert response.json() == {
        "object": "adapter.deleted",
        "name": "a",
        "versions": ["a@1", "a@2"],
        "cut": {},
        "deleted": True,
    }
    assert client.get(f"{ADAPTERS}/a").status_code == 404
    assert client.post("/v1/chat/completions", json=chat("a")).status_code == 404
    assert client.get("/v1/residency").json()["data"] == []
    assert built.stored() == empty


def test_a_name_that_was_deleted_goes_on_counting(client: TestClient) -> None:
    upload(client, "a", 1)
    client.delete(f"{ADAPTERS}/a")
    assert upload(client, "a", 1)["version"] == 2
    assert client.post("/v1/chat/completions", json=chat("a@1")).status_code == 404


def test_a_version_that_an_alias_serves_is_not_deleted(client: TestClient) -> None:
    upload(client, "a", 1)
    upload(client, "a", 2)
    refused = client.delete(f"{ADAPTERS}/a/versions/2")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "version_in_use")
    assert client.delete(f"{ADAPTERS}/a/versions/1").json()["deleted"] is True
    assert [item["version"] for item in client.get(f"{ADAPTERS}/a").json()["versions"]] == [2]


async def test_a_deletion_that_takes_longer_is_202(tiny_base: Path, tmp_path: Path) -> None:
    async with world(tiny_base, tmp_path / "data").running() as built:
        ingest(built, "a")
        built.engine.pause(after=1)
        stream = Exchange(built.app, "/v1/chat/completions", chat("a", stream=True))
        answering = stream.start()
        await until(lambda: built.engine.running == 1)
        deletion = Exchange(built.app, f"{ADAPTERS}/a?wait_s=0.01", {}, "DELETE")
        await deletion.start()
        assert (deletion.status, json.loads(deletion.text)["deleted"]) == (202, False)
        shown = Exchange(built.app, f"{ADAPTERS}/a", {}, "GET")
        await shown.start()
        (version,) = json.loads(shown.text)["versions"]
        assert (version["state"], version["leases"]) == ("draining", 1)
        built.engine.go_on()
        await answering
        await until(lambda: not built.services.registry.adapters())


def test_a_deletion_that_fails_is_an_error(client: TestClient, built: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise StoreError("disk on fire")

    upload(client, "a")
    monkeypatch.setattr(built.services.ingest, "forget", fail)
    response = client.delete(f"{ADAPTERS}/a")
    assert (response.status_code, response.json()["error"]["code"]) == (500, "store_error")


@pytest.mark.parametrize("path", ["", "/versions/1", "/aliases/blue"])
def test_what_is_not_there_cannot_be_deleted(refusing: TestClient, path: str) -> None:
    assert refusing.delete(f"{ADAPTERS}/none{path}").status_code == 404


def broken(**changes: Any) -> dict[str, bytes]:
    return AdapterFiles(**changes).files()


def cut(files: dict[str, bytes]) -> dict[str, bytes]:
    return {**files, "adapter_model.safetensors": files["adapter_model.safetensors"][:-5]}


def spoiled(value: float) -> dict[str, bytes]:
    tensors = lora_tensors()
    name = next(iter(tensors))
    wrong = np.full(tensors[name].shape, value, dtype="<f4")
    return broken(tensors={**tensors, name: tensor(wrong)})


def renamed(module: str) -> dict[str, bytes]:
    return broken(tensors={name.replace("q_proj", module): item for name, item in lora_tensors().items()})


BAD = {
    "pickle": ({"adapter_config.json": b"{}", "adapter_model.bin": b"\x80\x04."}, 422, "pickle"),
    "cut": (cut(broken()), 422, "bad_safetensors"),
    "NaN": (spoiled(float("nan")), 422, "non_finite"),
    "infinite": (spoiled(float("inf")), 422, "non_finite"),
    "rank": (broken(config=lora_config(r=32)), 422, "rank_mismatch"),
    "prompt": (broken(config=lora_config(peft_type="PROMPT_TUNING")), 422, "changes_prompt"),
    "xlora": (broken(config=lora_config(peft_type="XLORA")), 422, "not_lora"),
    "other base": (renamed("c_attn"), 422, "unknown_module"),
    "no modules": (broken(tensors={}), 422, "no_modules"),
    "output head": (renamed("lm_head"), 422, "unsupported_module"),
    "dora": (broken(config=lora_config(use_dora=True)), 422, "dora"),
    "no weights": ({"adapter_config.json": b"{}"}, 422, "missing_file"),
    "no config": ({"adapter_model.safetensors": safetensors(lora_tensors())}, 422, "missing_file"),
    "config is a list": ({**broken(), "adapter_config.json": b"[]"}, 422, "bad_json"),
    "path": ({**broken(), "../../evil": b""}, 400, "unsafe_archive"),
    "nothing": ({}, 400, "bad_upload"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_upload_has_a_reason_and_leaves_the_store_alone(refusing: TestClient, kind: str) -> None:
    files, status, code = BAD[kind]
    response = refusing.post(ADAPTERS, data={"name": "bad"}, files=as_parts(files) or {"promote": (None, "true")})
    assert (response.status_code, response.json()["error"]["code"]) == (status, code), response.text
    assert response.json()["error"]["message"]
    assert refusing.get(f"{ADAPTERS}/bad").status_code == 404


IA3 = {f"base_model.model.{module}.ia3_l": tensor(np.ones((shape[0], 1))) for module, shape in MODULES.items()}


def test_what_only_a_merge_can_serve_is_kept_but_not_served(refusing: TestClient) -> None:
    files = broken(config=lora_config(peft_type="IA3"), tensors=IA3)
    shown = refusing.post(ADAPTERS, data={"name": "scaled"}, files=as_parts(files))
    assert (shown.status_code, shown.json()["state"], shown.json()["aliases"]) == (201, "merge_only", [])
    assert shown.json()["verdict"].startswith("merge only: it scales rows or columns")
    assert shown.json()["manifest"]["kind"] == "ia3"
    assert shown.json()["reason"] == shown.json()["manifest"]["merge_only"]
    moved = refusing.put(f"{ADAPTERS}/scaled/aliases/default", json={"version": 1})
    assert moved.status_code == 409
    body = {"model": "scaled@1", "messages": [{"role": "user", "content": "hi"}]}
    answer = refusing.post("/v1/chat/completions", json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "adapter_merge_only")
    assert refusing.delete(f"{ADAPTERS}/scaled").json()["deleted"]


@pytest.mark.parametrize("given", ["-0.1", "1.5", "nan", "much"])
def test_a_max_error_that_is_no_share_is_refused(refusing: TestClient, given: str) -> None:
    response = refusing.post(ADAPTERS, data={"name": "a", "max_error": given}, files=as_parts(broken()))
    assert (response.status_code, response.json()["error"]["param"]) == (400, "max_error")


@pytest.mark.parametrize("name", ["", "a/b", "../a", "a b", "a@1", "ä", "-a", "a" * 129, "tiny"])
def test_a_bad_name_is_refused(refusing: TestClient, name: str) -> None:
    response = refusing.post(ADAPTERS, data={"name": name}, files=as_parts(adapter_files().files()))
    assert (response.status_code, response.json()["error"]["code"]) == (422, "bad_name")


@pytest.mark.parametrize("as_object", [False, True])
def test_a_sha256_in_the_form_is_checked(client: TestClient, as_object: bool) -> None:
    files = adapter_files().files()
    right = hashlib.sha256(files["adapter_model.safetensors"]).hexdigest()

    def post(hexed: str) -> Any:
        sha256 = json.dumps({"adapter_model.safetensors": hexed}) if as_object else hexed
        return client.post(ADAPTERS, data={"name": "a", "sha256": sha256}, files=as_parts(files))

    refused = post("0" * 64)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "sha256_mismatch")
    assert client.get(ADAPTERS).json()["data"] == []
    assert post(right).status_code == 201


@pytest.mark.parametrize("field", [{"promot": "false"}, {"sha256": "{"}, {"sha256": '{"a": 1}'}])
def test_a_field_that_is_unknown_or_wrong_is_named(refusing: TestClient, field: dict[str, str]) -> None:
    response = refusing.post(ADAPTERS, data={"name": "a", **field}, files=as_parts(adapter_files().files()))
    assert (response.status_code, response.json()["error"]["param"]) == (400, next(iter(field)))


def test_promote_is_true_or_false(refusing: TestClient) -> None:
    response = refusing.post(ADAPTERS, data={"name": "a", "promote": "maybe"}, files=as_parts(adapter_files().files()))
    assert (response.status_code, response.json()["error"]["param"]) == (400, "promote")


def link_archive(target: str) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        entry = tarfile.TarInfo("adapter_config.json")
        entry.type, entry.linkname = tarfile.SYMTYPE, target
        archive.addfile(entry)
    return out.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "status"),
    [
        ("a.tar", tar({"../adapter_config.json": b"{}"}, "w:"), 400),
        ("a.tar", tar({"/adapter_config.json": b"{}"}, "w:"), 400),
        ("a.tar", link_archive("/etc/passwd"), 400),
        ("a.tar.gz", b"no gzip", 400),
        ("a.tar", b"no tar" * 200, 400),
        ("a.zip", b"no zip", 400),
        ("a.tar.gz", gzip.compress(b"no tar" * 200), 400),
    ],
    ids=["up", "absolute", "link", "no gzip", "no tar", "no zip", "gzip without tar"],
)
def test_a_bad_archive_is_refused(refusing: TestClient, name: str, content: bytes, status: int) -> None:
    response = refusing.post(ADAPTERS, data={"name": "a"}, files={"file": (name, content)})
    assert response.status_code == status, response.text
    assert response.json()["error"]["type"] == "invalid_request_error"


FORM = "multipart/form-data; boundary=b"


@pytest.mark.parametrize(
    ("kind", "body", "code"),
    [
        ("application/json", b"{}", "bad_request"),
        ("application/json", b"{", "invalid_json"),
        ("text/plain", b"{}", "unsupported_media_type"),
        ("", b"", "unsupported_media_type"),
        ("multipart/form-data", b"x", "bad_multipart"),
        (FORM, b"", "bad_multipart"),
        (FORM, b"no boundary here", "bad_multipart"),
        (FORM, b"--b\r\nno header\r\n\r\nx\r\n--b--\r\n", "bad_multipart"),
        (FORM, b"--b\r\ncontent-disposition: form-data\r\n\r\nx\r\n--b--\r\n", "bad_multipart"),
    ],
    ids=[
        "json without source",
        "no json",
        "text",
        "none",
        "no boundary",
        "empty",
        "not multipart",
        "bad part",
        "part without name",
    ],
)
def test_a_body_that_is_no_multipart_is_refused(refusing: TestClient, kind: str, body: bytes, code: str) -> None:
    response = refusing.post(ADAPTERS, content=body, headers={"content-type": kind})
    assert (response.status_code, response.json()["error"]["code"]) == (400, code)


def test_a_multipart_body_that_ends_early_is_refused(refusing: TestClient) -> None:
    head = b'--b\r\ncontent-disposition: form-data; name="name"\r\n\r\na\r\n'
    part = b'--b\r\ncontent-disposition: form-data; name="f"; filename="adapter_config.json"\r\n\r\n{"peft_ty'
    response = refusing.post(ADAPTERS, content=head + part, headers={"content-type": "multipart/form-data; boundary=b"})
    assert (response.status_code, response.json()["error"]["code"]) == (400, "bad_multipart")


@pytest.mark.parametrize("declared", [True, False])
def test_an_upload_over_the_limit_is_413(tiny_base: Path, tmp_path: Path, declared: bool) -> None:
    built = world(tiny_base, tmp_path / "data", max_upload_bytes=1000)
    line = b'--b\r\ncontent-disposition: form-data; name="f"; filename="adapter_model.safetensors"\r\n\r\n'
    body = line + b"\0" * (2 << 20) + b"\r\n--b--\r\n"
    with built.client() as client:
        stored = built.stored()
        content = body if declared else (body[at : at + 65536] for at in range(0, len(body), 65536))
        headers = {"content-type": "multipart/form-data; boundary=b"}
        response = client.post(ADAPTERS, content=content, headers=headers)
        assert (response.status_code, response.json()["error"]["code"]) == (413, "upload_too_large")
        assert built.stored() == stored


def test_what_unpacks_to_more_than_the_limit_is_413(tiny_base: Path, tmp_path: Path) -> None:
    built = world(tiny_base, tmp_path / "data", max_upload_bytes=100_000)
    bomb = tar({"adapter_config.json": b" " * 5_000_000})
    assert len(bomb) < 10_000
    with built.client() as client:
        stored = built.stored()
        response = client.post(ADAPTERS, data={"name": "a"}, files={"file": ("a.tar.gz", bomb)})
        assert (response.status_code, response.json()["error"]["code"]) == (413, "upload_too_large")
        assert built.stored() == stored


def test_too_many_files_are_refused(tiny_base: Path, tmp_path: Path) -> None:
    built = world(tiny_base, tmp_path / "data", max_upload_files=3)
    with built.client() as client:
        files = as_parts({f"{number}.txt": b"" for number in range(4)})
        response = client.post(ADAPTERS, data={"name": "a"}, files=files)
    assert response.status_code == 400


def test_adapters_and_aliases_survive_a_restart(tiny_base: Path, tmp_path: Path) -> None:
    with world(tiny_base, tmp_path / "data").client() as client:
        digest = upload(client, "a", 1)["digest"]
        upload(client, "a", 2, promote="false")
        before = client.get(f"{ADAPTERS}/a").json()
    again = world(tiny_base, tmp_path / "data")
    with again.client() as client:
        assert client.get(f"{ADAPTERS}/a").json() == before
        while client.get("/readyz").status_code != 200:
            pass
        assert f"[a@{digest[7:19]}]" in said(client.post("/v1/chat/completions", json=chat("a")).json())


def test_a_rollback_moves_traffic_back_and_is_on_record(client: TestClient) -> None:
    for seed in (1, 2):
        upload(client, "a", seed)
    response = client.post(f"{ADAPTERS}/a/rollback")
    assert (response.status_code, response.json()["aliases"]) == (200, {"default": 1})
    assert client.post("/v1/chat/completions", json=chat("a")).headers["x-loraplex-version"] == "1"
    shown = client.get(f"{ADAPTERS}/a/aliases/default").json()
    assert (shown["object"], shown["alias"], shown["version"]) == ("adapter.alias", "default", 1)
    moves = [(move["from"], move["to"], move["how"], move["by"], move["undone"]) for move in shown["moves"]]
    assert moves == [
        (2, 1, "rollback", "anonymous", False),
        (1, 2, "upload", "anonymous", True),
        (None, 1, "upload", "anonymous", False),
    ]


def test_a_rollback_of_another_alias(client: TestClient) -> None:
    for seed in (1, 2):
        upload(client, "a", seed)
        client.put(f"{ADAPTERS}/a/aliases/blue", json={"version": seed})
    assert client.post(f"{ADAPTERS}/a/rollback", json={"alias": "blue"}).json()["aliases"] == {"blue": 1, "default": 2}
    assert client.get(f"{ADAPTERS}/a/aliases/green").status_code == 404


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [({}, 409, "nothing_to_roll_back"), ({"alias": "blue"}, 404, "not_found"), ({"alias": 7}, 400, None)],
)
def test_a_rollback_that_cannot_be(refusing: TestClient, body: dict[str, Any], status: int, code: str | None) -> None:
    response = refusing.post(f"{ADAPTERS}/good/rollback", json=body)
    assert response.status_code == status
    assert code in (None, response.json()["error"]["code"])


def test_a_split_alias_answers_each_user_with_one_version(client: TestClient) -> None:
    for seed in (1, 2):
        upload(client, "a", seed)
    split = {"1": 50, "2": 50}
    shown = client.put(f"{ADAPTERS}/a/aliases/default", json={"split": split}).json()
    assert (shown["aliases"], shown["splits"]) == ({"default": 1}, {"default": split})
    assert [version["aliases"] for version in shown["versions"]] == [["default"], ["default"]]
    assert client.get(f"{ADAPTERS}/a/aliases/default").json()["split"] == split

    def served(user: str | None) -> str:
        more = {} if user is None else {"user": user}
        return client.post("/v1/chat/completions", json=chat("a", **more)).headers["x-loraplex-version"]

    of_user = {user: served(user) for user in ("ann", "bob", "cem", "dan", "eva", "fay")}
    assert set(of_user.values()) == {"1", "2"}
    assert {user: served(user) for user in of_user} == of_user
    assert {served(None) for _ in range(40)} == {"1", "2"}
    assert client.delete(f"{ADAPTERS}/a/versions/2").status_code == 409


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({}, 400, None),
        ({"version": 1, "split": {"1": 1}}, 400, None),
        ({"split": {"one": 1}}, 400, None),
        ({"split": {"1": 0.5}}, 400, None),
        ({"split": {}}, 422, "bad_split"),
        ({"split": {"1": 1, "7": 1}}, 404, "not_found"),
    ],
)
def test_a_split_that_cannot_be(refusing: TestClient, body: dict[str, Any], status: int, code: str | None) -> None:
    response = refusing.put(f"{ADAPTERS}/good/aliases/default", json=body)
    assert response.status_code == status
    assert code in (None, response.json()["error"]["code"])


def test_a_long_list_comes_in_pages(client: TestClient) -> None:
    for name in "cab":
        upload(client, name)
    first = client.get(ADAPTERS, params={"limit": 2}).json()
    assert ([each["name"] for each in first["data"]], first["has_more"]) == (["a", "b"], True)
    assert (first["first_id"], first["last_id"]) == ("a", "b")
    second = client.get(ADAPTERS, params={"limit": 2, "after": first["last_id"]}).json()
    assert ([each["name"] for each in second["data"]], second["has_more"]) == (["c"], False)
    assert client.get(ADAPTERS, params={"after": "c"}).json()["last_id"] is None
    assert client.get(ADAPTERS, params={"limit": 0}).status_code == 400
