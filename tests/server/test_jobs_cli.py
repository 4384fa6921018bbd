"""`loraplex adapters push SOURCE` and `loraplex jobs` against a server on a real socket, with the fake engine."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.cli import main
from server.launch import ServerProcess, launch
from tests.adapters.factories import AdapterFiles, lora_tensors, tar, write_base
from tests.adapters.web_server import COMMIT, WebServer, files_at, hub_of, serving
from tests.server.harness import PATIENCE_S, adapter_files

Call = Callable[..., str]
ROOT = Path(__file__).parents[2]
CHUNK, SMALL_CHUNK = 1 << 16, 1 << 13
"""Of a body; in small ones, with a pause after each, the large adapter takes a minute and a half."""
LARGE = AdapterFiles(extra={"README.md": bytes(4 << 20)}).files()


@pytest.fixture(scope="module")
def hub() -> Iterator[WebServer]:
    with serving(hub_of({"org/name": adapter_files(3).files(), "org/large": LARGE})) as server:
        yield server


@pytest.fixture(scope="module")
def web() -> Iterator[WebServer]:
    with serving(files_at({"/a.tar.gz": tar(adapter_files(4).files()), "/bad.zip": b"PK"})) as server:
        yield server


def flags_of(root: Path, *more: str) -> list[str]:
    if not (root / "tiny").exists():
        write_base(root / "tiny")
    return ["--engine", "fake", "--model", str(root / "tiny"), "--data-dir", str(root / "data"), *more]


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, hub: WebServer, web: WebServer, s3: Callable[[], str]
) -> Iterator[ServerProcess]:
    root = tmp_path_factory.mktemp("sources")
    adapter_files(5).write(root / "shelf" / "run")
    flags = flags_of(root, "--source-protocols", "hf", "--source-protocols", "s3")
    flags += ["--source-roots", str(root / "shelf"), "--source-roots", web.url]
    environment = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(root / "hub")}
    with launch(flags, root / "server.log", env=environment) as running:
        running.wait_ready(PATIENCE_S)
        yield running


@pytest.fixture
def call(server: ServerProcess, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """`loraplex WORDS`; its output, errors included."""
    monkeypatch.setenv("LORAPLEX_SERVER", server.url)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*words: str, code: int = 0) -> str:
        assert main(list(words)) == code
        shown = capsys.readouterr()
        return shown.out + shown.err

    return call


def test_push_from_the_hub_names_the_commit(call: Call) -> None:
    pushed = call("adapters", "push", "hf://org/name@main", "--name", "from-hub")
    assert re.search(r"from-hub@1\n +status +(ready|resident)", pushed)
    shown = json.loads(call("adapters", "show", "from-hub@1", "--json"))
    assert shown["manifest"]["lineage"]["source"]["commit"] == COMMIT


def test_push_from_a_bucket_a_url_and_a_directory(call: Call, server: ServerProcess, web: WebServer, s3: Any) -> None:
    import fsspec

    bucket = s3()
    for name, content in adapter_files(6).files().items():
        with fsspec.open(f"{bucket}/run/{name}", "wb") as file:
            file.write(content)
    shelf = server.log.parent / "shelf"
    for number, source in enumerate((f"{bucket}/run", f"{web.url}/a.tar.gz", f"file://{shelf}/run"), start=1):
        assert f"many@{number}\n" in call("adapters", "push", source, "--name", "many")
    assert "many@3, which it was already" in call("adapters", "push", f"file://{shelf}/run", "--name", "many")


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("hf://org/none", "no repository org/none"),
        ("https://host/a.zip", r"\(source_not_allowed\)"),
        ("file:///etc", r"\(source_not_allowed\)"),
        ("WEB/bad.zip", r"\(bad_archive\)"),
    ],
)
def test_what_cannot_be_taken_in_says_why_and_exits_1(call: Call, web: WebServer, source: str, complaint: str) -> None:
    words = ("adapters", "push", source.replace("WEB", web.url), "--name", "a")
    assert re.search(complaint, call(*words, code=1))


def test_a_sha256_that_differs(call: Call) -> None:
    said = call("adapters", "push", "hf://org/name", "--name", "a", "--sha256", "0" * 64, code=1)
    assert "(sha256_mismatch)" in said


def test_a_job_that_nobody_waits_for_is_listed_shown_and_cancelled(
    call: Call, hub: WebServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.pause_s, hub.chunk_bytes = 0.2, SMALL_CHUNK
    try:
        job = json.loads(call("adapters", "push", "hf://org/large", "--name", "l", "--no-wait", "--json"))
        monkeypatch.setenv("COLUMNS", "80")
        assert job["id"] in call("jobs", "list")
        assert re.search(rf"{job['id']} (will stop|cancelled)", call("jobs", "cancel", job["id"]))
        while json.loads(call("jobs", "show", job["id"], "--json"))["ended_at"] is None:
            time.sleep(0.05)
    finally:
        hub.pause_s, hub.chunk_bytes = 0, CHUNK
    shown = call("jobs", "show", job["id"])
    assert "fetch, cancelled" in shown
    assert "source hf://org/large" in shown
    assert "asked to stop by anonymous" in shown or "cancelled by anonymous" in shown
    assert job["id"] in call("jobs", "list", "--state", "cancelled")
    assert "there is no job 'x'" in call("jobs", "show", "x", code=1)


def test_ctrl_c_cancels_the_job(server: ServerProcess, hub: WebServer) -> None:
    hub.pause_s, hub.chunk_bytes = 0.2, SMALL_CHUNK
    command = [sys.executable, "-m", "server.cli", "adapters", "push", "hf://org/large", "--name", "l"]
    environment = {**os.environ, "LORAPLEX_SERVER": server.url}
    pushing = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        while not (running := jobs(server, "running")):
            time.sleep(0.05)
        while f'/v1/jobs/{running[0]["id"]}"' not in server.log.read_text():  # it follows what it asked for
            time.sleep(0.05)
        pushing.send_signal(signal.SIGINT)
        said, _ = pushing.communicate(timeout=PATIENCE_S)
    finally:
        hub.pause_s, hub.chunk_bytes = 0, CHUNK
        pushing.kill()
    assert pushing.returncode == 1
    assert "cancelling job-" in said
    assert "was cancelled; nothing was taken in (job_cancelled)" in said
    assert jobs(server, "running") == []


def jobs(server: ServerProcess, state: str) -> list[dict[str, Any]]:
    answer = httpx.get(f"{server.url}/v1/jobs", params={"state": state}, trust_env=False, timeout=60)
    return list(answer.json()["data"])


def test_killed_in_the_middle_of_a_fetch_the_next_start_ends_it(tmp_path: Path, web: WebServer) -> None:
    files = AdapterFiles(tensors=lora_tensors(seed=9), extra={"README.md": bytes(2 << 20)}).files()
    with serving(files_at({"/a.tar": tar(files, "w:")})) as slow:
        slow.pause_s, slow.chunk_bytes = 0.5, SMALL_CHUNK
        flags = flags_of(tmp_path, "--source-roots", slow.url)
        with launch(flags, tmp_path / "first.log") as first:
            first.wait_ready(PATIENCE_S)
            body = {"name": "a", "source": f"{slow.url}/a.tar"}
            job_id = httpx.post(f"{first.url}/v1/adapters", json=body, trust_env=False, timeout=60).json()["id"]
            while not jobs(first, "running") or not jobs(first, "running")[0]["progress"].get("bytes"):
                time.sleep(0.05)
            first.kill()
        slow.pause_s, slow.chunk_bytes = 0, CHUNK
        with launch(flags, tmp_path / "second.log") as second:
            second.wait_ready(PATIENCE_S)
            while (job := httpx.get(f"{second.url}/v1/jobs/{job_id}", trust_env=False, timeout=60).json())[
                "ended_at"
            ] is None:
                time.sleep(0.2)
            assert (job["state"], job["attempts"], job["result"]["version"]) == ("succeeded", 2, 1)
            assert list((tmp_path / "data" / "adapters" / "staging").iterdir()) == []
            version = httpx.get(f"{second.url}/v1/adapters/a/versions/1", trust_env=False, timeout=60).json()
            assert version["digest"] == job["result"]["digest"]
