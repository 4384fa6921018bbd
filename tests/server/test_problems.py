from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

import adapters.errors
import server.errors
from server import problems
from tests.server.harness import World, as_parts, chat, world


def tree(root: type[Exception]) -> Iterator[type[Exception]]:
    yield root
    for child in root.__subclasses__():
        yield from tree(child)


ERRORS = [*tree(server.errors.ServerError), *tree(adapters.errors.AdapterError)]


def assert_one_body(response: Any, status: int, code: str | None, kind: str = "invalid_request_error") -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    error = response.json()["error"]
    assert response.json().keys() == {"error"}
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"]
    assert (error["type"], error["code"]) == (kind, code)


@pytest.mark.parametrize("error", ERRORS)
def test_every_error_class_has_a_status(error: type[Exception]) -> None:
    assert problems.STATUS[error] in (400, 401, 403, 404, 409, 412, 413, 416, 422, 429, 500, 502, 503, 507)


def test_the_two_trees_are_all_there() -> None:
    assert len(ERRORS) >= 22
    assert set(problems.STATUS) == set(ERRORS)


@pytest.mark.parametrize("error", ERRORS)
def test_every_error_class_has_a_code_of_its_own(error: type[Any]) -> None:
    assert error.code == error("why").code
    assert [other for other in ERRORS if other.code == error.code] == [error]  # type: ignore[attr-defined]


def test_an_error_outside_the_trees_says_nothing_of_its_inside() -> None:
    response = problems.response(RuntimeError("the password is swordfish"))
    assert response.status_code == 500
    assert b"swordfish" not in response.body


@pytest.mark.parametrize(
    ("error", "status", "retry_after"),
    [(server.errors.Overloaded("full"), 429, "1"), (server.errors.EngineUnavailable("down"), 503, "5")],
)
def test_what_is_worth_another_try_says_when(error: Exception, status: int, retry_after: str) -> None:
    response = problems.response(error)
    assert (response.status_code, response.headers["retry-after"]) == (status, retry_after)


def test_an_error_event_is_the_same_body_as_one_event() -> None:
    event = problems.event(503, "it\ndied", code="engine_unavailable")
    assert event == (
        'data: {"error": {"message": "it\\ndied", "type": "server_error", "param": null, '
        '"code": "engine_unavailable"}}\n\n'
    )


def test_an_unknown_url(refusing: TestClient) -> None:
    assert_one_body(refusing.get("/v1/nothing"), 404, "unknown_url")


def test_a_wrong_method(refusing: TestClient) -> None:
    response = refusing.put("/v1/models", json={})
    assert_one_body(response, 405, "method_not_allowed")
    assert response.headers["allow"] == "GET"


def test_an_unknown_model(refusing: TestClient) -> None:
    assert_one_body(refusing.post("/v1/chat/completions", json=chat("none")), 404, "model_not_found")


def test_an_unknown_adapter(refusing: TestClient) -> None:
    assert_one_body(refusing.get("/v1/adapters/none"), 404, "not_found")


def test_a_parameter_that_is_no_number(refusing: TestClient) -> None:
    response = refusing.delete("/v1/adapters/none/versions/x")
    assert_one_body(response, 400, "bad_request")
    assert response.json()["error"]["param"] == "number"


def test_a_missing_field(refusing: TestClient) -> None:
    response = refusing.put("/v1/adapters/none/aliases/stable", json={})
    assert_one_body(response, 400, "bad_request")
    assert response.json()["error"]["param"] == "version"


def test_a_body_that_is_no_json_where_fastapi_reads_it(refusing: TestClient) -> None:
    response = refusing.put(
        "/v1/adapters/none/aliases/stable", content=b"{", headers={"content-type": "application/json"}
    )
    assert_one_body(response, 400, "bad_request")


def test_an_adapter_that_cannot_be_served(refusing: TestClient) -> None:
    response = refusing.post("/v1/adapters", data={"name": "a"}, files=as_parts({"adapter_model.bin": b"pickle"}))
    assert_one_body(response, 422, "pickle")


def test_a_body_that_is_too_large(tiny_base: Any, tmp_path: Any) -> None:
    with world(tiny_base, tmp_path / "data", max_request_bytes=100).client() as client:
        response = client.post("/v1/chat/completions", json=chat(prompt="x" * 100))
    assert_one_body(response, 413, "request_too_large")


def test_an_engine_that_is_not_there(built: World) -> None:
    built.services.pool.open = lambda: None  # type: ignore[method-assign]
    with built.client() as client:
        response = client.post("/v1/chat/completions", json=chat())
    assert_one_body(response, 503, "engine_unavailable", "server_error")
    assert response.headers["retry-after"] == "5"


def test_an_error_that_nobody_foresaw(
    client: TestClient, built: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("swordfish")

    monkeypatch.setattr(built.services.registry, "adapters", fail)
    response = client.get("/v1/adapters")
    assert_one_body(response, 500, "internal_error", "server_error")
    assert "swordfish" not in response.text
    assert "swordfish" in caplog.text
