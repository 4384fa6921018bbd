from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.routing import BaseRoute
from starlette.testclient import TestClient

from tests.server.harness import KEYS, chat

OPEN = {"/livez", "/readyz", "/health"}
PUBLISHING = {
    ("POST", "/v1/adapters"),
    ("POST", "/v1/adapters/gc"),
    ("PUT", "/v1/adapters/{name}/aliases/{alias}"),
    ("DELETE", "/v1/adapters/{name}/aliases/{alias}"),
    ("POST", "/v1/adapters/{name}/rollback"),
    ("DELETE", "/v1/adapters/{name}/versions/{number}"),
    ("DELETE", "/v1/adapters/{name}"),
    ("PATCH", "/v1/adapters/{name}"),
    ("GET", "/v1/adapters/{name}/versions/{ref}/files"),
    ("GET", "/v1/adapters/{name}/versions/{ref}/files/{file}"),
    ("GET", "/v1/adapters/{name}/versions/{ref}/archive"),
    ("PATCH", "/v1/adapters/{name}/versions/{number}"),
    ("GET", "/v1/jobs"),
    ("GET", "/v1/jobs/{job_id}"),
    ("GET", "/v1/jobs/{job_id}/events"),
    ("POST", "/v1/jobs/{job_id}/cancel"),
    ("GET", "/v1/promotions"),
    ("GET", "/v1/promotions/{promotion_id}"),
}
OPERATING = {
    ("GET", "/metrics"),
    ("GET", "/v1/residency"),
    ("GET", "/version"),
    ("GET", "/openapi.json"),
    ("POST", "/v1/adapters/verify"),
    ("PUT", "/v1/adapters/{name}/versions/{number}/merged"),
    ("GET", "/v1/adapters/{name}/versions/{number}/merged"),
    ("DELETE", "/v1/adapters/{name}/versions/{number}/merged"),
}


def publishes(method: str, path: str) -> bool:
    return (method, path) in PUBLISHING or path.startswith(
        ("/v1/files", "/v1/fine_tuning/", "/v1/merges", "/v1/exports")
    )


def every_route(routes: list[BaseRoute]) -> Iterator[tuple[str, str]]:
    for route in routes:
        if (included := getattr(route, "original_router", None)) is not None:
            yield from every_route(included.routes)
            continue
        assert isinstance(route, APIRoute), f"{route} is of a kind that this test does not know"
        for method in sorted(route.methods):
            yield method, route.path


def filled(path: str) -> str:
    return re.sub(r"\{[^}]+\}", "1", path)


def bearer(secret: str) -> dict[str, str]:
    return {"authorization": f"Bearer {secret}"}


def app_of(client: TestClient) -> FastAPI:
    assert isinstance(client.app, FastAPI)
    return client.app


def test_every_route_but_health_refuses_a_caller_without_key(guarded: TestClient) -> None:
    routes = [route for route in every_route(app_of(guarded).routes) if route[1] not in OPEN]
    assert len(routes) > 14
    for method, path in routes:
        response = guarded.request(method, filled(path))
        assert response.status_code == 401, (method, path)
        if method == "HEAD":
            continue  # which has no body
        assert response.json()["error"]["code"] == "missing_api_key", (method, path)
        assert response.json()["error"]["type"] == "authentication_error", (method, path)
        assert response.headers["www-authenticate"] == "Bearer"


def test_every_route_refuses_a_key_of_another_scope(guarded: TestClient) -> None:
    for method, path in every_route(app_of(guarded).routes):
        if path in OPEN:
            continue
        if (method, path) in OPERATING:
            insufficient = [KEYS["infer"], KEYS["publish"]]
        else:
            insufficient = [KEYS["infer"] if publishes(method, path) else KEYS["publish"]]
        for secret in insufficient:
            response = guarded.request(method, filled(path), headers=bearer(secret))
            assert response.status_code == 403, (method, path)
            if method == "HEAD":
                continue
            assert response.json()["error"]["code"] == "missing_scope", (method, path)
            assert response.json()["error"]["type"] == "permission_error", (method, path)


def test_every_route_lets_an_admin_in(guarded: TestClient) -> None:
    for method, path in every_route(app_of(guarded).routes):
        response = guarded.request(method, filled(path), headers=bearer(KEYS["admin"]))
        assert response.status_code not in (401, 403, 500), (method, path)


@pytest.mark.parametrize("path", sorted(OPEN))
def test_health_needs_no_key(guarded: TestClient, path: str) -> None:
    assert guarded.get(path).status_code == 200


@pytest.mark.parametrize(
    ("header", "code"),
    [
        ("", "missing_api_key"),
        ("Bearer", "missing_api_key"),
        ("Bearer ", "missing_api_key"),
        (f"Basic {KEYS['admin']}", "missing_api_key"),
        (KEYS["admin"], "missing_api_key"),
        ("Bearer unknown", "invalid_api_key"),
        (f"Bearer {KEYS['admin']}x", "invalid_api_key"),
        (f"Bearer {KEYS['admin']} {KEYS['admin']}", "invalid_api_key"),
        ("Bearer \xe9\xff", "invalid_api_key"),
    ],
)
def test_an_odd_authorization_header_is_401(guarded: TestClient, header: str, code: str) -> None:
    response = guarded.get("/v1/models", headers=[(b"authorization", header.encode("latin-1"))])
    assert response.status_code == 401
    assert response.json()["error"]["code"] == code
    assert KEYS["admin"] not in response.text


@pytest.mark.parametrize("header", ["bearer {}", "BEARER {}", "Bearer   {}"])
def test_the_scheme_is_read_as_rfc_9110_says(guarded: TestClient, header: str) -> None:
    assert guarded.get("/v1/models", headers={"authorization": header.format(KEYS["infer"])}).status_code == 200


def test_a_key_in_the_query_is_not_read(guarded: TestClient) -> None:
    assert guarded.get("/v1/models", params={"api_key": KEYS["admin"]}).status_code == 401


def test_with_keys_host_and_origin_do_not_matter(guarded: TestClient) -> None:
    headers = bearer(KEYS["infer"]) | {"host": "loraplex.example", "origin": "https://console.example"}
    assert guarded.get("/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost:8000", "[::1]:8000", "127.1.2.3"])
def test_without_keys_this_machine_may_do_everything(refusing: TestClient, host: str) -> None:
    assert refusing.get("/metrics", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["loraplex.example", "localhost.evil.example", "127.0.0.1.evil.example", "192.168.1.2", "testserver", "0"]
)
def test_without_keys_a_foreign_host_is_refused(refusing: TestClient, host: str) -> None:
    response = refusing.get("/v1/models", headers={"host": host})
    assert response.status_code == 403
    assert response.json()["error"]["code"] == "not_local"


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://127.0.0.1:9999", "http://localhost"])
def test_without_keys_a_foreign_page_is_refused(refusing: TestClient, origin: str) -> None:
    response = refusing.post("/v1/chat/completions", json=chat(), headers={"origin": origin})
    assert response.status_code == 403
    assert response.json()["error"]["code"] == "not_local"


def test_without_keys_our_own_page_may_call(refusing: TestClient) -> None:
    headers = {"host": "127.0.0.1:8000", "origin": "http://127.0.0.1:8000"}
    assert refusing.get("/v1/models", headers=headers).status_code == 200
