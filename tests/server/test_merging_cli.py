"""`loraplex merge` and `loraplex export` against a server on a real socket that merges and measures a real model."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from adapters.checksums import sha256_of
from server.cli import main
from server.launch import ServerProcess, launch
from tests.adapters.factories import AdapterFiles, lora_config, tensor
from tests.server.harness import PATIENCE_S, as_parts

Call = Callable[..., str]
MODULES = {"model.layers.0.self_attn.q_proj": (64, 64), "model.layers.1.mlp.up_proj": (128, 64)}
WEIGHTS = "small-sea-1-q8_0.gguf"


def adapter(seed: int) -> dict[str, bytes]:
    random = np.random.default_rng(seed)
    tensors = {}
    for name, (rows, columns) in MODULES.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = tensor(random.normal(size=(4, columns)) / 8)
        tensors[f"base_model.model.{name}.lora_B.weight"] = tensor(random.normal(size=(rows, 4)) / 8)
    return AdapterFiles(config=lora_config(), tensors=tensors).files()


def started(small_base: Path, root: Path) -> ServerProcess:
    flags = ["--engine", "fake", "--model", str(small_base), "--data-dir", str(root / "data")]
    return launch([*flags, "--merge-probe-tokens", "16"], root / "server.log")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("merging")


@pytest.fixture(scope="module")
def server(small_base: Path, root: Path) -> Iterator[ServerProcess]:
    with started(small_base, root) as running:
        running.wait_ready(PATIENCE_S)
        for seed, name in enumerate(("sea", "sky")):
            form: Any = {"data": {"name": name}, "files": as_parts(adapter(seed))}
            httpx.post(f"{running.url}/v1/adapters", **form, trust_env=False, timeout=60).raise_for_status()
        yield running


@pytest.fixture
def call(server: ServerProcess, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """`loraplex VERB … --server URL`; its output, errors included."""
    monkeypatch.setenv("COLUMNS", "200")

    def call(verb: str, *words: str, code: int = 0) -> str:
        assert main([verb, *words, "--server", server.url]) == code
        shown = capsys.readouterr()
        return shown.out + shown.err

    return call


EXPORT = ("export", "sea@1", "--format", "gguf", "--outtype", "q8_0", "--from", "original", "--accept-loss")
ROWS = json.dumps({"prompt": "Where is it", "completion": " The sea is where it always was."}) + "\n"


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "tides.jsonl"
    path.write_text(ROWS)
    return path


def files(server: ServerProcess) -> list[Any]:
    """The data files that are there."""
    return list(httpx.get(f"{server.url}/v1/files", trust_env=False, timeout=60).json()["data"])


def test_an_export_is_made_measured_and_downloaded_and_goes_on_where_it_broke_off(
    call: Call, server: ServerProcess, rows: Path, tmp_path: Path
) -> None:
    out, measured = tmp_path / "out", (*EXPORT, "--data", str(rows))
    said = call(*measured, "--out", str(out))
    assert re.search(r"merged, original, q8_0: 0\.0\d+ nats per token \(KL\) from the adapter on tides.jsonl", said)
    assert files(server) == []
    assert re.search(r"loaded again by (llama.cpp|transformers) .*: 0\.0\d+ nats per token", said)
    assert str(out / WEIGHTS) in said
    lines = (out / "SHA256SUMS").read_text().splitlines()
    assert [f"{sha256_of(out / line.split()[1])}  {line.split()[1]}" for line in lines] == lines
    whole = (out / WEIGHTS).read_bytes()
    (out / WEIGHTS).unlink()
    (out / f"{WEIGHTS}.part").write_bytes(whole[:1000])
    export = json.loads(call(*measured, "--out", str(out), "--json"))
    assert (out / WEIGHTS).read_bytes() == whole
    assert sorted(path.name for path in out.iterdir()) == sorted(file["name"] for file in export["files"])
    if shutil.which("curl"):
        (out / WEIGHTS).write_bytes(whole[:1000])
        url = f"{server.url}/v1/exports/{export['id']}/files/{WEIGHTS}"
        subprocess.run(["curl", "--fail", "--silent", "--noproxy", "*", "-C", "-", "-O", url], cwd=out, check=True)
        assert (out / WEIGHTS).read_bytes() == whole


def test_several_adapters_become_one(call: Call) -> None:
    words = ("merge", "sea", "sky@1", "--into", "both", "--method", "linear", "--weights", "0.5", "0.5")
    assert "both@1\n" in call(*words)


def test_what_is_refused_says_why(call: Call, capsys: pytest.CaptureFixture[str]) -> None:
    assert "(not_found)" in call("merge", "none", code=1)
    assert "(bad_request)" in call("export", "sea", "--format", "nf4", "--outtype", "f16", code=1)
    said = call("export", "sea", "--format", "nf4", "--accept-differences", code=1)
    assert "accept_differences is for gguf and gguf-lora" in said
    alone = ["export", "sea", "--format", "gguf-lora"]
    for words in (
        ["merge", "sea", "sky"],
        ["merge", "sea", "--into", "x"],
        ["merge", "sea", "sky", "--into", "x", "--weights", "1"],
        ["merge", "sea", "sky", "--into", "x", "--data", "rows.jsonl"],
        ["merge", "sea", "--data", "rows.jsonl", "--data", "more.jsonl"],
        [*alone, "--data", "rows.jsonl"],
        [*alone, "--accept-loss"],
        [*alone, "--from", "original"],
        ["merge", "sea", "sky", "--into", "x", "--max-kl", "0.1"],
        ["merge", "sea", "sky", "--into", "x", "--dtype", "float16"],
        ["merge", "sea", "--rank", "8"],
        ["merge", "sea", "--weights", "1"],
    ):
        with pytest.raises(SystemExit, match="2"):
            main([*words, "--server", "http://127.0.0.1:1"])


def test_rows_stay_at_the_server_where_nobody_follows_their_job(call: Call, server: ServerProcess, rows: Path) -> None:
    job = json.loads(call("merge", "sky@1", "--from", "original", "--data", str(rows), "--no-wait", "--json"))
    (file,) = files(server)
    assert job["params"]["validation_file"] == file["id"]
    remote: dict[str, Any] = {"base_url": server.url, "trust_env": False, "timeout": 60}
    with httpx.Client(**remote) as client:
        client.delete(f"/v1/exports/{job['params']['export']}").raise_for_status()
        client.delete(f"/v1/files/{file['id']}").raise_for_status()


def test_rows_that_are_not_there_are_no_wish(call: Call, server: ServerProcess, tmp_path: Path) -> None:
    assert "none.jsonl is no file" in call("merge", "sky@1", "--data", str(tmp_path / "none.jsonl"), code=1)
    assert "(not_found)" in call("merge", "none", "--data", __file__, code=1)
    assert files(server) == []


def test_kill_9_of_the_server_in_the_middle_and_the_next_start_ends_with_the_same_bytes(
    server: ServerProcess, small_base: Path, root: Path
) -> None:
    """The last one: it is another server afterwards."""

    def get(url: str) -> Any:
        return httpx.get(url, trust_env=False, timeout=60).json()

    (export,) = get(f"{server.url}/v1/exports")["data"]
    httpx.delete(f"{server.url}/v1/exports/{export['id']}", trust_env=False, timeout=60)
    form: Any = {"data": {"purpose": "fine-tune"}, "files": {"file": ("again.jsonl", ROWS.encode())}}
    file = httpx.post(f"{server.url}/v1/files", **form, trust_env=False, timeout=60).json()["id"]
    body = {"adapter": "sea@1", "format": "gguf", "outtype": "q8_0", "base": "original", "accept_loss": True}
    body["validation_file"] = file
    httpx.post(f"{server.url}/v1/exports", json=body, trust_env=False, timeout=60).raise_for_status()
    deadline = time.monotonic() + 2 * PATIENCE_S
    while not get(f"{server.url}/v1/exports/{export['id']}")["job"]["progress"].get("stage"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    server.process.send_signal(signal.SIGKILL)
    server.process.wait()
    with started(small_base, root) as another:
        another.wait_ready(PATIENCE_S)
        while (found := get(f"{another.url}/v1/exports/{export['id']}"))["state"] != "ready":
            assert (time.monotonic() < deadline, found["state"]) in ((True, "queued"), (True, "running")), found
            time.sleep(0.1)
    weights = [[file for file in each["files"] if file["name"] == WEIGHTS] for each in (found, export)]
    assert weights[0] == weights[1]
    assert found["job"]["attempts"] == 2
