"""The siege over HTTP: a sample of every family of hostile uploads, four at a time, and requests that are no uploads at
all, against a real server process with the fake engine. It refuses each with a reason, goes on answering, and is in the
end what it was: not a byte more on the disk, no more memory.

tests/adapters/test_hostile.py sends all of them, past HTTP.
"""

from __future__ import annotations

import json
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from server.launch import ServerProcess, launch
from tests.adapters import hostile, mutants
from tests.adapters.factories import AdapterFiles, lora_tensors, write_base
from tests.adapters.hostile import CANARY, LIMITS, Hostile

OF_EACH_FAMILY, MUTANTS = 6, 60
AT_ONCE = 4
CHAT = {"model": "good", "messages": [{"role": "user", "content": "hello"}]}
MOST_GROWTH_BYTES = 96 << 20
"""Of the server's memory: what four uploads at a time may hold in their buffers."""


@dataclass(frozen=True)
class Fortress:
    server: ServerProcess
    root: Path

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.server.url, timeout=60, trust_env=False)

    def files(self) -> dict[str, bytes]:
        """All that lies in the data directory and where temporary files go. Of the database its rows are compared."""
        places = [self.root / "data", self.root / "temporary"]
        found = [path for place in places for path in sorted(place.rglob("*")) if path.is_file()]
        return {str(path): path.read_bytes() for path in found if not path.name.startswith("registry.db")}

    def listed(self) -> Any:
        with self.client() as client:
            return client.get("/v1/adapters").raise_for_status().json()

    def memory_bytes(self) -> int:
        return int(psutil.Process(self.server.process.pid).memory_info().rss)


def upload(client: httpx.Client, name: str, files: hostile.Sent) -> httpx.Response:
    return client.post("/v1/adapters", data={"name": name}, files=[("files", (file, data)) for file, data in files])


@pytest.fixture(scope="module")
def fortress(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fortress]:
    root = tmp_path_factory.mktemp("fortress")
    (root / "temporary").mkdir()
    flags = ["--engine", "fake", "--model", str(write_base(root / "tiny")), "--data-dir", str(root / "data")]
    flags += ["--max-upload-bytes", str(LIMITS.max_bytes), "--max-upload-files", str(LIMITS.max_files)]
    with launch(flags, root / "server.log", env={"TMPDIR": str(root / "temporary")}) as server:
        server.wait_ready()
        built = Fortress(server, root)
        with built.client() as client:
            assert upload(client, "good", list(AdapterFiles().files().items())).status_code == 201
        yield built


@pytest.fixture(autouse=True)
def _unchanged(fortress: Fortress) -> Iterator[None]:
    """Healthy, and with nothing more than before; it takes a good adapter, serves it and lets it go."""
    listed, files = fortress.listed(), fortress.files()
    yield
    with fortress.client() as client:
        assert client.get("/livez").status_code == client.get("/readyz").status_code == 200
        other = list(AdapterFiles(tensors=lora_tensors(seed=1)).files().items())
        assert upload(client, "another", other).status_code == 201
        assert client.post("/v1/chat/completions", json={**CHAT, "model": "another"}).status_code == 200
        assert client.delete("/v1/adapters/another").json()["deleted"] is True
    assert fortress.listed() == listed
    assert fortress.files() == files
    assert not CANARY.exists()


def sample() -> Iterator[Hostile]:
    for family in hostile.names():
        cases = [case for case in hostile.of_family(family) if can_be_sent(case)]
        yield from cases[:: max(1, len(cases) // OF_EACH_FAMILY)][:OF_EACH_FAMILY]


def can_be_sent(case: Hostile) -> bool:
    """By a client that does not change the names of files on the way."""
    return bool(case.sent) and all(
        name.isprintable() and name.isascii() and not set('"\\%') & set(name) and name for name, _ in case.sent
    )


def test_every_family_is_refused_while_others_are_served(fortress: Fortress) -> None:
    served, over = [0], threading.Event()

    def ask() -> None:
        with fortress.client() as client:
            while not over.wait(0.02):
                assert client.post("/v1/chat/completions", json=CHAT).status_code == 200
                served[0] += 1

    def attack(case: Hostile) -> tuple[Hostile, int, dict[str, Any]]:
        with fortress.client() as client:
            answer = upload(client, "bad", case.sent)
            return case, answer.status_code, answer.json().get("error", {})

    before = fortress.memory_bytes()
    with ThreadPoolExecutor(AT_ONCE + 1) as pool:
        asking = pool.submit(ask)
        answers = list(pool.map(attack, sample()))
        over.set()
        asking.result()
    families = Counter(case.family for case, _, _ in answers)
    for case, status, error in answers:
        assert status in (400, 413, 422), f"{case}: {status} {error}"
        assert error["code"] in case.codes | {"bad_multipart"}, f"{case}: {error}"
        assert 20 < len(error["message"]) < 700, f"{case}: {error}"
    assert families.keys() == set(hostile.names())
    assert families.total() > 150
    assert served[0] > 10
    assert fortress.memory_bytes() - before < MOST_GROWTH_BYTES


def test_mutants_over_http(fortress: Fortress) -> None:
    cases = [case for case in (*mutants.of_bytes(9, MUTANTS), *mutants.of_structure(9, MUTANTS)) if can_be_sent(case)]
    accepted = 0
    with fortress.client() as client:
        for case in cases:
            answer = upload(client, "mutant", case.sent)
            assert answer.status_code in (200, 201, 400, 413, 422), f"{case}: {answer.text}"
            accepted += answer.status_code in (200, 201)
        if accepted:
            assert client.delete("/v1/adapters/mutant").json()["deleted"] is True
    assert accepted < len(cases) / 3


def part(head: str, content: bytes = b"x") -> bytes:
    return b"--b\r\n" + head.encode() + b"\r\n\r\n" + content + b"\r\n"


def field(name: str, value: bytes) -> bytes:
    return part(f'content-disposition: form-data; name="{name}"', value)


def form(*parts: bytes, name: bytes = b"bad") -> bytes:
    return b"".join([field("name", name), *parts, b"--b--\r\n"])


def good_parts() -> list[bytes]:
    return [
        part(f'content-disposition: form-data; name="files"; filename="{name}"', content)
        for name, content in AdapterFiles().files().items()
    ]


FORM = "multipart/form-data; boundary=b"
DEEP = b'{"a":' * 900 + b"1" + b"}" * 900
BODIES: dict[str, tuple[str, bytes]] = {
    "headers of a part": (FORM, form(part("x: " + "y" * 100_000), *good_parts())),
    "many headers of a part": (FORM, form(part("\r\n".join(f"x{n}: y" for n in range(500))), *good_parts())),
    "a header without a colon": (FORM, form(part("content-disposition"), *good_parts())),
    "a part without a name": (FORM, form(part("content-disposition: form-data"), *good_parts())),
    "many fields": (FORM, form(*(field(f"f{n}", b"x") for n in range(100)), *good_parts())),
    "many files": (FORM, form(*good_parts(), *(good_parts()[0].replace(b"adapter_", b"%d" % n) for n in range(300)))),
    "a field of megabytes": (FORM, form(field("description", b"x" * (2 << 20)), *good_parts())),
    "an unknown field": (FORM, form(field("admin", b"true"), *good_parts())),
    "no end": (FORM, form(*good_parts())[:-8]),
    "another boundary": ("multipart/form-data; boundary=c", form(*good_parts())),
    "a boundary of 10,000": (f"multipart/form-data; boundary={'b' * 10_000}", form(*good_parts())),
    "no boundary": ("multipart/form-data", form(*good_parts())),
    "mixed": ("multipart/mixed; boundary=b", form(*good_parts())),
    "a form": ("application/x-www-form-urlencoded", b"name=bad"),
    "a name of bytes": (FORM, form(*good_parts(), name=b"\xff\xfe")),
    "a name with NUL": (FORM, form(*good_parts(), name=b"a\0b")),
    "a name that leads out": (FORM, form(*good_parts(), name=b"../../bad")),
    "a name of a megabyte": (FORM, form(*good_parts(), name=b"a" * (1 << 20))),
    "lineage that is deep": (FORM, form(field("lineage", DEEP), *good_parts())),
    "lineage that is a list": (FORM, form(field("lineage", b"[1]"), *good_parts())),
    "lineage of surrogates": (FORM, form(field("lineage", b'{"a":"\\ud800"}'), *good_parts())),
    "lineage of 1e400": (FORM, form(field("lineage", b'{"a":1e400}'), *good_parts())),
    "tags of objects": (FORM, form(field("tags", b'{"a":{"b":1}}'), *good_parts())),
    "a tag with a line break": (FORM, form(field("tags", b'{"a":"b\\nc"}'), *good_parts())),
    "a sum that is none": (FORM, form(field("sha256", b"x"), *good_parts())),
    "a sum of something else": (FORM, form(field("sha256", b"0" * 64), *good_parts())),
    "sums of everything": (FORM, form(field("sha256", json.dumps({f"{n}": "0" * 64 for n in range(2000)}).encode()))),
    "an error that is none": (FORM, form(field("max_error", b"nan"), *good_parts())),
    "an error below 0": (FORM, form(field("max_error", b"-1"), *good_parts())),
    "promote perhaps": (FORM, form(field("promote", b"perhaps"), *good_parts())),
    "a description of controls": (FORM, form(field("description", b"a\x00b"), *good_parts())),
    "JSON that is deep": ("application/json", DEEP),
    "JSON that is none": ("application/json", b"{"),
    "JSON of another kind": ("application/json", b"[]"),
    "a source of this machine": ("application/json", b'{"name":"bad","source":"file:///etc/passwd"}'),
    "a source of another kind": ("application/json", b'{"name":"bad","source":["file:///"]}'),
}


@pytest.mark.parametrize("kind", BODIES)
def test_a_request_that_is_no_upload_is_refused(fortress: Fortress, kind: str) -> None:
    content_type, body = BODIES[kind]
    with fortress.client() as client:
        answer = client.post("/v1/adapters", content=body, headers={"content-type": content_type})
    assert 400 <= answer.status_code < 500, answer.text
    assert answer.json()["error"]["message"], answer.text


HEAD = "POST /v1/adapters HTTP/1.1\r\nhost: x\r\ncontent-type: " + FORM + "\r\n"
WIRES: dict[str, bytes] = {
    "less than declared": HEAD.encode() + b"content-length: 9999\r\n\r\n" + form(*good_parts()),
    "chunks that are cut off": HEAD.encode() + b"transfer-encoding: chunked\r\n\r\nffff\r\n--b\r\n",
    "chunks that are none": HEAD.encode() + b"transfer-encoding: chunked\r\n\r\nzz\r\nx\r\n0\r\n\r\n",
    "a negative length": HEAD.encode() + b"content-length: -1\r\n\r\n",
    "two lengths": HEAD.encode() + b"content-length: 3\r\ncontent-length: 4\r\n\r\nabc",
    "8 EB declared": HEAD.encode() + b"content-length: 9223372036854775807\r\n\r\n" + form(*good_parts()),
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
}


@pytest.mark.parametrize("kind", WIRES)
def test_a_connection_that_breaks_off_leaves_nothing(fortress: Fortress, kind: str) -> None:
    host, _, port = fortress.server.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=120) as connection:
        connection.sendall(WIRES[kind])
        connection.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    assert not answer or answer.startswith(b"HTTP/1.1 4"), answer
