from __future__ import annotations

import time
from pathlib import Path

import pytest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from server.engine.protocol import Stats
from server.telemetry import OTHER, AdapterLabels, Telemetry
from tests.server.harness import World, chat, upload, world


def page(client: TestClient) -> dict[str, Metric]:
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    families = list(text_string_to_metric_families(response.text))
    assert len({family.name for family in families}) == len(families), "a family occurs twice"
    return {family.name: family for family in families}


def value(families: dict[str, Metric], sample: str, **labels: str) -> float:
    found = [
        item.value
        for family in families.values()
        for item in family.samples
        if item.name == sample and labels.items() <= item.labels.items()
    ]
    assert len(found) == 1, (sample, labels, found)
    return float(found[0])


def test_the_first_names_keep_their_label_and_later_ones_share_one() -> None:
    labels = AdapterLabels(2)
    assert [labels.of(name) for name in ("a", "b", "c", "a", "d", "b")] == ["a", "b", OTHER, "a", OTHER, "b"]


def test_the_labels_of_a_page_are_bounded() -> None:
    telemetry = Telemetry(max_adapters=3)
    for number in range(50):
        telemetry.request(f"adapter{number}", "chat", 200, Stats(ttft_s=0.1, generated_tokens=1))
    (requests,) = [family for family in telemetry._registry.collect() if family.name == "loraplex_requests"]
    counts = {item.labels["adapter"]: item.value for item in requests.samples if item.name.endswith("_total")}
    assert counts == {"adapter0": 1, "adapter1": 1, "adapter2": 1, OTHER: 47}


def test_requests_and_tokens_are_counted_by_adapter(client: TestClient) -> None:
    upload(client, "a")
    for stream in (False, True):
        client.post("/v1/chat/completions", json=chat("a@1", stream=stream))
    client.post("/v1/completions", json={"prompt": "one"})
    families = page(client)
    assert value(families, "loraplex_requests_total", adapter="a", endpoint="chat", status="200") == 2
    assert value(families, "loraplex_requests_total", adapter="tiny", endpoint="completions", status="200") == 1
    assert value(families, "loraplex_generated_tokens_total", adapter="a") == 2 * 4
    assert value(families, "loraplex_time_to_first_token_seconds_count", adapter="a") == 2


def test_what_clients_invent_makes_no_series(client: TestClient) -> None:
    for number in range(5):
        client.post("/v1/chat/completions", json=chat(f"invented{number}"))
    assert "invented" not in client.get("/metrics").text


def test_the_state_of_engine_and_residency(client: TestClient) -> None:
    before = page(client)
    assert value(before, "loraplex_engine_ready") == 1
    assert value(before, "loraplex_adapters_resident") == 0
    upload(client, "a")
    for _ in range(3):
        client.post("/v1/chat/completions", json=chat("a"))
    after = page(client)
    assert value(after, "loraplex_adapters_resident") == 1
    assert value(after, "loraplex_adapter_loads_total") == 1
    assert value(after, "loraplex_adapter_hits_total") == 2
    assert value(after, "loraplex_adapter_leases") == 0
    assert value(after, "loraplex_engine_restarts_total") == 0


def test_routers_find_one_series_with_what_is_loaded(client: TestClient) -> None:
    digests = {name: upload(client, name, seed)["digest"] for seed, name in enumerate(("b", "a"))}
    for name in digests:
        client.post("/v1/chat/completions", json=chat(name))
    (info,) = page(client)["vllm:lora_requests_info"].samples
    assert info.labels == {
        "max_lora": "16",
        "running_lora_adapters": f"a@{digests['a'][7:19]},b@{digests['b'][7:19]}",
        "waiting_lora_adapters": "",
    }
    assert info.value == pytest.approx(time.time(), abs=60)


def test_the_page_is_there_before_the_engine_is(tiny_base: Path, tmp_path: Path) -> None:
    built: World = world(tiny_base, tmp_path / "data")
    built.services.pool.open = lambda: None  # type: ignore[method-assign]
    with built.client() as client:
        assert value(page(client), "loraplex_engine_ready") == 0
