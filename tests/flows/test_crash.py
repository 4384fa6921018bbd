"""Kill -9 of the API process in the middle of uploads: after a restart each adapter is there whole, or not at all.

The fake engine, since the API process is what is killed; everything else is the real server on a real socket.
tests/adapters/test_crash.py does the same at every single step inside the store and the registry.
"""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path

import httpx
import pytest

from adapters.base import BaseModel
from adapters.store import digest_files
from loadtests.synthetic import write_adapter
from server.launch import ServerProcess, launch

ROUNDS = 6
MESSAGES = [{"role": "user", "content": "hello"}]


def serve(base: BaseModel, data: Path) -> ServerProcess:
    flags = ["--engine", "fake", "--model", str(base.path), "--data-dir", str(data)]
    return launch(flags, data.parent / "server.log")


def upload(url: str, name: str, directory: Path) -> httpx.Response:
    files = [("files", (file.name, file.read_bytes())) for file in sorted(directory.iterdir())]
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
        return client.post("/v1/adapters", data={"name": name}, files=files)


def killed_in_mid_upload(base: BaseModel, data: Path, adapter: Path, name: str, delay_s: float) -> int | None:
    """The status the client saw, or None when the connection died with the server."""
    seen: list[int] = []

    def client() -> None:
        try:
            seen.append(upload(server.url, name, adapter).status_code)
        except httpx.TransportError:
            return

    with serve(base, data) as server:
        server.wait_ready()
        uploading = threading.Thread(target=client)
        uploading.start()
        time.sleep(delay_s)
        server.kill()
        uploading.join()
    return seen[0] if seen else None


@pytest.fixture(scope="module")
def adapter(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("crash") / "adapter", base, rank=16, seed=1)


def test_after_a_kill_every_adapter_is_whole_or_absent(base: BaseModel, adapter: Path, tmp_path: Path) -> None:
    data, chance = tmp_path / "data", random.Random(0)
    with serve(base, data) as server:
        server.wait_ready()
        started = time.perf_counter()
        assert upload(server.url, "first", adapter).status_code == 201
        upload_s = time.perf_counter() - started
    for number in range(ROUNDS):
        # Other bytes each time, so that no round finds its blob already there.
        (adapter / "README.md").write_text(f"round {number}")
        status = killed_in_mid_upload(base, data, adapter, f"a{number}", chance.uniform(0, 1.5 * upload_s))
        with serve(base, data) as server:
            server.wait_ready()
            registered = whole_adapters(server.url, data)
            assert "first" in registered
            if status is not None:
                assert f"a{number}" in registered
            else:
                assert upload(server.url, f"a{number}", adapter).status_code in (200, 201)
    leftovers = list((data / "adapters" / "staging").iterdir())
    assert leftovers == []
    assert len(list((data / "adapters" / "blobs").iterdir())) == 1 + ROUNDS


def whole_adapters(url: str, data: Path) -> set[str]:
    """Names of the registered adapters, each of them checked against its digest and asked to answer."""
    names = set()
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
        for adapter in client.get("/v1/adapters").raise_for_status().json()["data"]:
            for version in adapter["versions"]:
                blob = data / "adapters" / "blobs" / version["digest"].removeprefix("sha256:")
                assert digest_files(blob)[0] == version["digest"]
            answer = client.post("/v1/chat/completions", json={"model": adapter["name"], "messages": MESSAGES})
            assert answer.status_code == 200, answer.text
            names.add(adapter["name"])
    return names
