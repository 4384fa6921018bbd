"""A version's merged engine as a job: merged for real by a process that measures nothing; the engines are fake."""

from __future__ import annotations

import asyncio
import io
import json
from pathlib import Path
from typing import Any

import pytest

from adapters.records import QUARANTINED
from server import merging
from server.engine.fake import FakeEngine
from server.merged_orders import budget
from server.routes.jobs import job_json
from server.settings import Settings
from tests.server.harness import PATIENCE_S, Exchange, World, chat, ingest, until, world

MERGED = "/v1/adapters/a/versions/1/merged"
JOB_S = PATIENCE_S


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "WORKER", "tests.server.stand_in_merger")


@pytest.fixture
def built(tiny_base: Path, tmp_path: Path) -> World:
    """Serves the base's own values, as tiny layers cannot be packed; nothing must stay free."""
    return world(tiny_base, tmp_path / "data", quantization="none", memory_reserve_bytes=0)


async def ask(built: World, method: str, path: str = MERGED, body: Any = None) -> tuple[int, Any]:
    exchange = Exchange(built.app, path, {} if body is None else body, method)
    await exchange.start()
    return exchange.status, json.loads(exchange.text)


async def way(built: World) -> str:
    exchange = Exchange(built.app, "/v1/chat/completions", chat("a@1"))
    await exchange.start()
    headers: dict[bytes, bytes] = dict(exchange.messages[0]["headers"])
    return headers[b"x-loraplex-path"].decode()


def left(built: World) -> set[str]:
    root = built.settings.data_dir / "merged" / built.services.identity.id
    return {path.name for path in root.iterdir()} if root.exists() else set()


async def test_from_the_wish_to_the_engine_and_back(built: World) -> None:
    name = ingest(built, "a")
    hold = built.settings.data_dir / "control" / "hold"
    hold.parent.mkdir()
    hold.touch()
    async with built.running():
        assert (await ask(built, "GET"))[0] == 404
        status, job = await ask(built, "PUT")
        assert (status, job["kind"], job["state"]) == (202, "merged_engine", "queued")
        assert (await ask(built, "PUT"))[1]["id"] == job["id"], "a second wish is the same job"
        assert await way(built) == "lora"
        hold.unlink()
        ended = job_json(await built.services.runner.ended(job["id"], JOB_S))
        assert (ended["state"], ended["error"]) == ("succeeded", None)
        assert ended["progress"]["stage"] == "ready"
        assert await way(built) == "merged"

        status, engine = await ask(built, "PUT")
        assert (status, engine["name"], engine["state"], engine["version"]) == (200, name, "ready", 1)
        assert (await ask(built, "GET"))[1] == engine
        assert ended["result"]["fidelity"]["within_budget"]
        assert left(built) == {f"{name.partition('@')[2]}-served-bfloat16"}
        assert str(built.settings.data_dir) not in json.dumps(engine) + json.dumps(ended)

        status, end = await ask(built, "DELETE")
        assert (status, end) == (
            200,
            {"object": "merged_engine.ended", "version": "a@1", "job": None, "ended": True},
        )
        assert await way(built) == "lora"
        await until(lambda: left(built) == set())


class Gated(FakeEngine):
    async def start(self) -> None:
        await asyncio.Event().wait()


async def test_falling_back_while_it_is_built_ends_the_job_and_leaves_nothing(
    built: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(World, "_make_merged", lambda self, name, _: Gated(name))
    name = ingest(built, "a")
    async with built.running():
        _, job = await ask(built, "PUT")
        await until(lambda: (engine := built.services.merged.find(name)) and engine.state == "building", JOB_S)
        assert (await ask(built, "GET"))[1]["state"] == "building"
        status, end = await ask(built, "DELETE")
        assert (status, end["job"], end["ended"]) == (200, job["id"], True)
        assert (await built.services.runner.ended(job["id"], JOB_S)).state == "cancelled"
        assert built.services.merged.snapshot() == {}
        assert await way(built) == "lora"
        await until(lambda: left(built) == set())


async def test_an_engine_that_does_not_start_is_the_jobs_error(built: World, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(FakeEngine):
        async def start(self) -> None:
            raise RuntimeError("no such kernel")

    monkeypatch.setattr(World, "_make_merged", lambda self, name, _: Broken(name))
    ingest(built, "a")
    async with built.running():
        _, job = await ask(built, "PUT", body={"base": "auto"})
        ended = await built.services.runner.ended(job["id"], JOB_S)
        assert ended.error is not None
        assert (ended.state, ended.error["code"], ended.error["status"]) == ("failed", "merged_engine_failed", 503)
        assert "no such kernel" in ended.error["message"]
        await until(lambda: left(built) == set())


async def test_a_version_that_goes_while_it_is_merged_gets_no_engine(built: World) -> None:
    ingest(built, "a")
    hold = built.settings.data_dir / "control" / "hold"
    hold.parent.mkdir()
    hold.touch()
    async with built.running():
        _, job = await ask(built, "PUT")
        await until(lambda: left(built), JOB_S)
        assert (await ask(built, "DELETE", "/v1/adapters/a"))[0] == 200
        hold.unlink()
        ended = await built.services.runner.ended(job["id"], JOB_S)
        assert ended.error is not None
        assert (ended.state, ended.error["code"]) == ("failed", "not_found")
        assert (built.merged, built.services.merged.snapshot()) == ([], {})


def rows(built: World, text: bytes = b"my rows") -> str:
    return built.services.files.create(io.BytesIO(text), "rows.jsonl", "fine-tune").id


async def test_it_is_measured_on_the_rows_that_are_given(built: World) -> None:
    ingest(built, "a")
    async with built.running():
        status, refused = await ask(built, "PUT", body={"validation_file": "file-1"})
        assert (status, refused["error"]["param"]) == (400, "validation_file")
        assert built.services.jobs.jobs() == []
        _, job = await ask(built, "PUT", body={"validation_file": rows(built)})
        ended = job_json(await built.services.runner.ended(job["id"], JOB_S))
        assert (ended["state"], ended["result"]["fidelity"]["probes"]) == ("succeeded", "my rows")


async def test_rows_that_are_gone_do_not_keep_it_from_being_built_again(built: World) -> None:
    ingest(built, "a")
    version, file = built.services.registry.resolve("a"), rows(built)
    asked = {"base": "original", "validation_file": file}
    first = built.services.merged_versions.ask_again(version, asked, "me")
    assert {name: first.params[name] for name in asked} == asked
    built.services.jobs.cancel(first.id)
    built.services.files.delete(file)
    second = built.services.merged_versions.ask_again(version, asked, "me")
    assert second.id != first.id
    assert (second.params["base"], "validation_file" in second.params) == ("original", False)


async def test_a_merge_that_loses_too_much_is_refused(built: World) -> None:
    ingest(built, "a")
    kl = built.settings.data_dir / "control" / "kl"
    kl.parent.mkdir()
    kl.write_text("0.5")
    async with built.running():
        _, job = await ask(built, "PUT", body={"base": "original"})
        ended = await built.services.runner.ended(job["id"], JOB_S)
        assert ended.error is not None
        assert (ended.state, ended.error["code"], built.merged) == ("failed", "unfaithful_merge", [])


@pytest.mark.parametrize(
    ("quantization", "asked", "taken"),
    [
        ("none", {"base": "original", "dtype": "bfloat16", "accept_loss": False}, False),
        ("none", {"base": "original", "dtype": "bfloat16", "accept_loss": True}, True),
        ("none", {"base": "served", "dtype": "bfloat16", "accept_loss": False}, True),
        ("none", {"base": "served", "dtype": "nf4", "accept_loss": False}, False),
        ("nf4", {"base": "served", "dtype": "bfloat16", "accept_loss": False}, False),
    ],
)
def test_what_is_served_like_that_already_is_taken_in_any_case(
    quantization: Any, asked: dict[str, Any], taken: bool
) -> None:
    assert budget(asked, Settings(quantization=quantization)).accept_loss == taken


async def test_what_the_merge_refuses_is_the_jobs_error(built: World) -> None:
    ingest(built, "a")
    version = built.services.registry.resolve("a", "1")
    (built.services.store.path(version.digest) / "adapter_model.safetensors").write_bytes(b"damaged")
    async with built.running():
        _, job = await ask(built, "PUT")
        ended = await built.services.runner.ended(job["id"], JOB_S)
        assert ended.error is not None
        assert (ended.state, ended.error["code"]) == ("failed", "bad_safetensors")
        assert built.merged == []


async def test_what_does_not_fit_is_refused_before_there_is_a_job(tiny_base: Path, tmp_path: Path) -> None:
    narrow = world(tiny_base, tmp_path / "data", quantization="none", memory_reserve_bytes=1 << 60)
    ingest(narrow, "a")
    async with narrow.running():
        status, body = await ask(narrow, "PUT")
        assert (status, body["error"]["code"]) == (409, "engine_does_not_fit")
        assert narrow.services.jobs.jobs() == []


async def test_where_merging_is_off_there_are_none(tiny_base: Path, tmp_path: Path) -> None:
    off = world(tiny_base, tmp_path / "data", merging=False)
    ingest(off, "a")
    async with off.running():
        status, body = await ask(off, "PUT")
        assert (status, body["error"]["code"]) == (403, "merging_off")


async def test_where_merging_is_off_the_jobs_of_others_are_left_to_them(tiny_base: Path, tmp_path: Path) -> None:
    """Several servers may share a database, and only one of them merges."""
    off = world(tiny_base, tmp_path / "data", merging=False)
    async with off.running():
        jobs = [off.services.jobs.create(kind, {}) for kind in merging.KINDS]
        off.services.runner.wake()
        for job in jobs:
            assert (await off.services.runner.ended(job.id, 0.5)).state == "queued"


async def test_no_merged_engines_where_none_are_allowed(tiny_base: Path, tmp_path: Path) -> None:
    none = world(tiny_base, tmp_path / "data", max_merged_engines=0)
    ingest(none, "a")
    async with none.running():
        status, body = await ask(none, "PUT")
        assert (status, body["error"]["code"]) == (409, "too_many_merged_engines")


async def test_a_version_that_must_not_serve_gets_none(built: World) -> None:
    ingest(built, "a")
    built.services.registry.set_state("a", 1, QUARANTINED)
    async with built.running():
        status, body = await ask(built, "PUT")
        assert (status, body["error"]["code"]) == (409, "adapter_quarantined")


@pytest.mark.parametrize("body", [{"directory": "/etc"}, {"base": "mine"}])
async def test_where_it_is_merged_is_not_the_clients_choice(built: World, body: dict[str, str]) -> None:
    ingest(built, "a")
    async with built.running():
        assert (await ask(built, "PUT", body=body))[0] == 400


async def test_what_a_crash_left_is_swept_and_what_a_job_needs_is_not(built: World) -> None:
    ingest(built, "a")
    version = built.services.registry.resolve("a", "1")
    built.services.merged_versions.ask(version, "auto", None)
    key = f"{version.digest[7:19]}-auto-bfloat16"
    others = ("0123456789ab-served-bfloat16", ".0123456789ab-served-bfloat16.merging", ".gone-x", "something")
    root, here = built.settings.data_dir / "merged", built.services.identity.id
    for name in (key, f".{key}.merging", *others):
        (root / here / name).mkdir(parents=True)
    for name in ("ba9876543210", "0123456789ab-served-bfloat16"):  # another server's, and what an older release left
        (root / name).mkdir()
    await built.services.merged_versions.sweep()
    assert left(built) == {key, f".{key}.merging"}
    assert {path.name for path in root.iterdir()} == {here, "ba9876543210"}
