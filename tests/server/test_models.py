from __future__ import annotations

from starlette.testclient import TestClient

from tests.server.harness import World, upload


def test_the_base_comes_first(client: TestClient) -> None:
    (card,) = client.get("/v1/models").json()["data"]
    assert card.pop("created") > 0
    assert card == {
        "id": "tiny",
        "object": "model",
        "owned_by": "loraplex",
        "root": "tiny",
        "parent": None,
        "max_model_len": 2048,
    }


def test_an_adapter_is_a_model_whose_parent_is_the_base(client: TestClient) -> None:
    upload(client, "a", 1)
    upload(client, "a", 2)
    listed = client.get("/v1/models").json()
    assert listed["object"] == "list"
    assert [card["id"] for card in listed["data"]] == ["tiny", "a"]
    card = listed["data"][1]
    assert (card["parent"], card["root"]) == ("tiny", "registry://a@2")


def test_one_model_by_name(client: TestClient) -> None:
    upload(client, "a.b-c_1")
    for name in ("tiny", "a.b-c_1"):
        assert client.get(f"/v1/models/{name}").json()["id"] == name


def test_an_unknown_model_is_openais_404(refusing: TestClient) -> None:
    response = refusing.get("/v1/models/org/none")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")


def test_what_cannot_serve_is_not_listed(client: TestClient, built: World) -> None:
    upload(client, "a")
    built.services.registry.set_state("a", 1, "quarantined", "NaN")
    assert [card["id"] for card in client.get("/v1/models").json()["data"]] == ["tiny"]


def test_the_list_is_there_before_the_engine_is(built: World) -> None:
    built.services.pool.open = lambda: None  # type: ignore[method-assign]
    with built.client() as client:
        (card,) = client.get("/v1/models").json()["data"]
    assert (card["id"], card["max_model_len"]) == ("tiny", None)


def test_a_split_is_listed_while_one_of_its_versions_serves(client: TestClient, built: World) -> None:
    for seed in (1, 2):
        upload(client, "a", seed)
    client.put("/v1/adapters/a/aliases/default", json={"split": {"1": 90, "2": 10}})
    built.services.registry.set_state("a", 1, "quarantined", "NaN")
    assert [card["id"] for card in client.get("/v1/models").json()["data"]] == ["tiny", "a"]
    built.services.registry.set_state("a", 2, "quarantined", "NaN")
    assert [card["id"] for card in client.get("/v1/models").json()["data"]] == ["tiny"]
