from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters.base import BaseModel
from server.app import create_app
from server.cli import main
from server.engine.fake import FakeEngine
from server.errors import SettingsError
from server.launch import ServerProcess, free_port, launch
from server.listen import require_free
from server.settings import Settings
from tests.server.harness import PATIENCE_S, chat, said


def test_without_a_command_it_says_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    shown = capsys.readouterr().err
    assert [word for word in ("serve", "train", "keys", "demo") if f"  {word}" not in shown] == []


def test_an_unknown_command_is_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["server"]) == 2
    assert "usage: loraplex" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_goes_to_standard_output(capsys: pytest.CaptureFixture[str], flag: str) -> None:
    assert main([flag]) == 0
    assert "usage: loraplex" in capsys.readouterr().out


def test_a_new_key_goes_to_standard_output_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "keys.toml"
    assert main(["keys", "new", "--key-file", str(path), "--id", "ann", "--scopes", "infer,publish"]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("lpx-")
    assert len(shown.out.split()) == 1
    assert shown.out.strip() not in shown.err
    (key,) = tomllib.loads(path.read_text())["key"]
    assert (key["id"], key["scopes"]) == ("ann", ["infer", "publish"])


def test_what_is_wrongly_configured_is_one_line_and_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("server.logs.configure", lambda _: None)
    for arguments in (
        ["serve", "--host", "0.0.0.0"],
        ["serve", "--max-lora=1"],
        ["serve", "--engine=fake", "--model", str(tmp_path)],
        ["serve", "--engine=fake", "--model", str(tmp_path / "none")],
        ["serve", "--engine=fake", "--model", "/none"],
        ["serve", "--engine=fake", "--model", "../none"],
        ["serve", "--host", "nowhere.invalid", "--api-keys", "infer:k"],
        ["serve", "--engine=fake", "--data-dir", "/proc/none"],
        ["serve", "--engine=fake", "--data-dir", __file__],
        ["keys", "new", "--key-file", str(tmp_path / "k"), "--id", "a", "--scopes", "root"],
    ):
        assert main(arguments) == 2, arguments
        shown = capsys.readouterr()
        assert shown.err.startswith(f"loraplex {arguments[0]}: ")
        assert shown.err.count("\n") == 1
        assert shown.out == ""


def test_a_port_that_is_taken_is_found_before_anything_is_started(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "--port", str(port), "--data-dir", str(tmp_path / "data")]) == 2
    shown = capsys.readouterr().err
    assert f"port {port}" in shown
    assert "--port" in shown
    assert not (tmp_path / "data").exists()
    require_free("127.0.0.1", port)


def test_one_address_of_a_host_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    def address(*numbers: str) -> Any:
        kind = (socket.AF_INET, socket.SOCK_STREAM, 0, "")
        return lambda *_, **__: [(*kind, (number, 0)) for number in numbers]

    monkeypatch.setattr(socket, "getaddrinfo", address("192.0.2.1", "127.0.0.1"))
    require_free("both", 0)
    monkeypatch.setattr(socket, "getaddrinfo", address("192.0.2.1"))
    with pytest.raises(SettingsError, match="cannot listen on elsewhere"):
        require_free("elsewhere", 0)


def test_a_broken_base_is_one_line_and_code_2(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("server.logs.configure", lambda _: None)
    (tiny_base / "model.safetensors").write_bytes(b"damaged")
    assert main(["serve", "--engine=fake", "--model", str(tiny_base), "--data-dir", str(tmp_path / "data")]) == 2
    shown = capsys.readouterr().err.splitlines()
    assert "model.safetensors" in shown[-1]


@pytest.mark.parametrize("url", ["nonsense", "oracle://me:swordfish@host/db"])
def test_a_database_that_cannot_be_used_is_one_line_and_code_2(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], url: str
) -> None:
    monkeypatch.setattr("server.logs.configure", lambda _: None)
    flags = ["--engine=fake", "--model", str(tiny_base), "--data-dir", str(tmp_path), "--database-url", url]
    assert main(["serve", *flags]) == 2
    shown = capsys.readouterr().err.splitlines()
    assert "postgresql+psycopg" in shown[-1]
    assert "swordfish" not in shown[-1]


def test_naming_the_command_imports_nothing_heavy() -> None:
    code = "import sys, server.cli; print([name for name in ('torch', 'vllm', 'fastapi') if name in sys.modules])"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ended.stdout == "[]\n"


def test_the_server_writes_json_lines_and_nothing_else(live_server: ServerProcess) -> None:
    with httpx.Client(base_url=live_server.url, trust_env=False, timeout=60) as client:
        assert said(client.post("/v1/chat/completions", json=chat()).json()) == "[tiny] one two three"
    lines = [json.loads(line) for line in live_server.log.read_text().splitlines()]
    assert {"time", "level", "logger", "message"} <= lines[0].keys()
    assert any("Uvicorn running on" in line["message"] for line in lines)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_cleanly(tiny_base: Path, tmp_path: Path, number: signal.Signals) -> None:
    flags = ["--engine", "fake", "--model", str(tiny_base), "--data-dir", str(tmp_path / "data")]
    with launch(flags, tmp_path / "server.log", port=free_port()) as server:
        server.wait_ready(PATIENCE_S)
        server.process.send_signal(number)
        assert server.process.wait(PATIENCE_S) == 0
        assert "Traceback" not in server.log.read_text()
        assert "Finished server process" in server.log.read_text()


def test_the_environment_is_ready_before_the_base_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Making the demo base imports torch, which would choose another directory for what it compiles."""
    order = []
    monkeypatch.setattr("server.engine.vllm_args.prepare_environment", lambda _: order.append("environment"))

    def find_base(_: Settings) -> BaseModel:
        order.append("base")
        raise SettingsError("enough")

    monkeypatch.setattr("server.app.find_base", find_base)
    with pytest.raises(SettingsError, match="enough"):
        create_app(Settings(data_dir=tmp_path))
    assert order == ["environment", "base"]


def test_an_engine_whose_first_start_fails_ends_the_server_with_code_1(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class BrokenEngine(FakeEngine):
        async def start(self) -> None:
            raise RuntimeError("no memory")

    monkeypatch.setattr("server.app.engine_builder", lambda *_: BrokenEngine)
    monkeypatch.setattr("server.engine.vllm_args.prepare_environment", lambda _: None)
    monkeypatch.setattr("server.logs.configure", lambda _: None)
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert main(["serve", "--model", str(tiny_base), "--data-dir", str(tmp_path / "data"), "--port", "0"]) == 1
    finally:
        signal.signal(signal.SIGTERM, before)
