"""The status of a version follows it from upload to deletion."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.server.harness import Exchange, World, chat, ingest, until, upload, world

ADAPTERS = "/v1/adapters"


async def shown(built: World, path: str) -> Any:
    asked = Exchange(built.app, path, {}, "GET")
    await asked.start()
    return json.loads(asked.text)


async def test_a_version_is_followed_from_its_load_to_its_deletion(tiny_base: Path, tmp_path: Path) -> None:
    async with world(tiny_base, tmp_path / "data", load_s=0.01).running() as built:
        name, seen = ingest(built, "a"), []

        async def look() -> dict[str, Any]:
            seen.append(await shown(built, f"{ADAPTERS}/a/versions/1"))
            return dict(seen[-1])

        assert (await look())["resident_since"] is None
        began = time.time()
        built.engine.pause(after=1, loads=True)
        stream = Exchange(built.app, "/v1/chat/completions", chat("a", " ".join("x" * 30), stream=True)).start()
        await until(built.services.residency.loading)
        await look()
        built.engine.go_on()
        built.engine.pause(after=1)
        await until(lambda: built.engine.running == 1)
        resident = await look()
        assert (resident["leases"], resident["waiting"], resident["resident"]) == (1, 0, True)
        assert resident["load_s"] >= 0.01
        assert began <= resident["resident_since"] <= time.time()
        assert (await shown(built, f"{ADAPTERS}/a"))["versions"][0]["status"] == "resident"
        deletion = Exchange(built.app, f"{ADAPTERS}/a?wait_s=0", {}, "DELETE")
        await deletion.start()
        assert (await look())["leases"] == 1
        built.engine.go_on()
        await stream
        await until(lambda: name not in built.services.residency.snapshot())
        assert [each["status"] for each in seen] == ["ready", "loading", "resident", "draining"]


async def test_those_who_wait_for_a_version_are_counted(tiny_base: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_num_seqs": 1, "max_loras": 1}
    async with world(tiny_base, tmp_path / "data", **settings).running() as narrow:
        ingest(narrow, "a")
        narrow.engine.pause()
        asked = [Exchange(narrow.app, "/v1/chat/completions", chat("a")) for _ in range(6)]
        answering = [each.start() for each in asked]
        turns = narrow.services.turns
        await until(lambda: narrow.engine.running >= 1 and narrow.engine.running + turns.waiting == 6)
        waiting = turns.waiting
        assert waiting > 0
        assert (await shown(narrow, f"{ADAPTERS}/a/versions/1"))["waiting"] == waiting
        (entry,) = (await shown(narrow, "/v1/residency"))["data"]
        assert (entry["waiting"], entry["leases"], entry["idle_s"]) == (waiting, 6 - waiting, 0.0)
        for each in asked:
            each.leave()
        await asyncio.wait(answering)


@pytest.mark.parametrize("state", ["quarantined", "failed"])
def test_another_state_is_the_status(client: TestClient, built: World, state: str) -> None:
    upload(client, "a")
    client.post("/v1/chat/completions", json=chat("a"))
    built.services.registry.set_state("a", 1, state, "for a reason")
    version = client.get(f"{ADAPTERS}/a/versions/1").json()
    assert (version["status"], version["reason"]) == (state, "for a reason")


def test_residency_names_adapter_version_and_rest(client: TestClient) -> None:
    for seed in (1, 2):
        digest = upload(client, "a", seed)["digest"]
    client.post("/v1/chat/completions", json=chat("a"))
    page = client.get("/v1/residency").json()
    (entry,) = page["data"]
    assert {key: entry[key] for key in ("name", "adapter", "version", "state", "leases", "waiting")} == {
        "name": f"a@{digest[7:19]}",
        "adapter": "a",
        "version": 2,
        "state": "resident",
        "leases": 0,
        "waiting": 0,
    }
    assert entry["idle_s"] >= 0
    assert entry["load_s"] > 0
    assert (page["loading"], page["waiting"], page["capacity"]) == ([], 0, 64)
