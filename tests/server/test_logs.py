from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from server import logs
from tests.server.harness import chat


@pytest.fixture
def lines() -> Iterator[Any]:
    """What a logger with our formatter writes, decoded."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logs.JsonFormatter())
    loggers = [logging.getLogger("server"), logging.getLogger("tests.logs")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    for logger, level in zip(loggers, levels, strict=True):
        logger.removeHandler(handler)
        logger.setLevel(level)


def test_a_line_is_one_object(lines: Any) -> None:
    logging.getLogger("tests.logs").warning("two\nlines of %s", "text", extra={"adapter": "a@1"})
    (line,) = lines()
    assert line.pop("time").endswith("Z")
    assert line == {"level": "warning", "logger": "tests.logs", "message": "two\nlines of text", "adapter": "a@1"}


def test_what_vllm_stamps_on_every_record_is_left_out(lines: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stamped as vLLM does it, by the record factory: an `extra` of that name is refused once vLLM is imported."""
    plain = logging.getLogRecordFactory()

    def stamping(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = plain(*args, **kwargs)
        record.vllm_process_name = "MainProcess"
        return record

    monkeypatch.setattr(logging, "_logRecordFactory", stamping)
    logging.getLogger("tests.logs").warning("hello")
    assert set(lines()[0]) == {"time", "level", "logger", "message"}


def test_a_traceback_stays_in_its_line(lines: Any) -> None:
    try:
        raise ValueError("swordfish")
    except ValueError:
        logging.getLogger("tests.logs").exception("failed")
    (line,) = lines()
    assert line["traceback"].endswith("ValueError: swordfish")


def test_what_json_does_not_know_is_written_as_text(lines: Any) -> None:
    logging.getLogger("tests.logs").warning("odd", extra={"thing": {1, 2}, "path": object})
    assert lines()[0]["thing"] == "{1, 2}"


def test_a_request_leaves_one_access_line_with_its_id(client: TestClient, lines: Any) -> None:
    client.post("/v1/chat/completions?secret=swordfish", json=chat(), headers={"x-request-id": "mine-1"})
    (line,) = [line for line in lines() if line["logger"] == "server.access"]
    assert (line["method"], line["path"], line["status"]) == ("POST", "/v1/chat/completions", 200)
    assert line["request_id"] == "mine-1"
    assert line["seconds"] >= 0


def test_lines_written_while_answering_carry_the_request_id(client: TestClient, lines: Any, built: Any) -> None:
    built.services.registry.adapters = lambda *_, **__: 1 / 0
    client.get("/v1/adapters", headers={"x-request-id": "mine-2"})
    (line,) = [line for line in lines() if line["level"] == "error"]
    assert (line["message"], line["request_id"]) == ("unhandled error", "mine-2")
    assert "ZeroDivisionError" in line["traceback"]


def test_the_client_may_choose_the_request_id(refusing: TestClient) -> None:
    assert refusing.get("/livez", headers={"x-request-id": "a-b_c.d:9"}).headers["x-request-id"] == "a-b_c.d:9"


@pytest.mark.parametrize("odd", ["", "a b", "a" * 129, 'x"y', "é"])
def test_an_odd_request_id_is_replaced(refusing: TestClient, odd: str) -> None:
    found = refusing.get("/livez", headers=[(b"x-request-id", odd.encode())]).headers["x-request-id"]
    assert found != odd
    assert len(found) == 32


def test_request_ids_differ(refusing: TestClient) -> None:
    assert len({refusing.get("/livez").headers["x-request-id"] for _ in range(10)}) == 10


def test_configure_sends_every_logger_through_one_json_handler(capsys: pytest.CaptureFixture[str]) -> None:
    logging.getLogger().handlers.clear()  # `configure` would close those of pytest
    logs.configure("info")
    logging.getLogger("server.x").info("ours")
    logging.getLogger("some.library").info("chatter")
    logging.getLogger("some.library").warning("theirs")
    sys.stderr.flush()
    written = [json.loads(line)["message"] for line in capsys.readouterr().err.splitlines()]
    assert written == ["ours", "theirs"]
