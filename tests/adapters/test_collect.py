"""Garbage collection straight on a store: what goes, what stays, and that a rollback still works afterwards."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from sqlalchemy import insert, update

from adapters import schema
from adapters.collect import collect
from adapters.errors import NotFound
from adapters.records import DRAINING
from tests.adapters.conftest import Shop
from tests.adapters.factories import AdapterFiles, lora_tensors


def stock(shop: Shop, name: str, count: int, first_seed: int = 1) -> None:
    for seed in range(first_seed, first_seed + count):
        shop.ingest.upload(name, AdapterFiles(tensors=lora_tensors(seed=seed)).uploads())


def numbers(shop: Shop, name: str) -> list[int]:
    return [version.number for version in shop.registry.adapter(name).versions]


def answer(shop: Shop, keep: int | None, **options: Any) -> tuple[list[str], dict[str, str], list[str]]:
    told = collect(shop.store, shop.registry, keep, **options).to_json()
    deleted = [f"{each['name']}@{each['version']}" for each in told["deleted"]]
    kept = {f"{each['name']}@{each['version']}": each["reason"] for each in told["kept"]}
    assert set(told["reasons"]) == set(kept.values())
    return deleted, kept, told["swept"]


def write(shop: Shop, table: Any, **values: Any) -> None:
    with shop.registry._database.write() as connection:
        connection.execute(insert(table).values(**values))


def test_the_newest_and_the_way_back_stay(shop: Shop) -> None:
    stock(shop, "a", 5)
    stock(shop, "b", 1)
    expected: Any = ["a@1", "a@2", "a@3"], {"a@4": "rollback", "a@5": "recent", "b@1": "recent"}, []
    before = shop.contents()
    assert answer(shop, 1, dry_run=True) == expected
    assert shop.contents() == before
    assert numbers(shop, "a") == [1, 2, 3, 4, 5]
    assert answer(shop, 1) == expected
    assert numbers(shop, "a") == [4, 5]
    assert len(shop.store.digests()) == 3
    assert shop.registry.rollback("a").aliases == {"default": 4}
    # Taken back: what the move before that came from is gone, so nothing else is held.
    assert answer(shop, 1) == ([], {"a@4": "alias", "a@5": "recent", "b@1": "recent"}, [])


def test_no_limit_takes_no_version_but_leftovers(shop: Shop) -> None:
    stock(shop, "a", 2)
    with shop.store.staging() as staged:
        (staged / "x").write_bytes(b"x")
        stranger = "sha256:" + "0" * 64
        shop.store.publish(staged, stranger)
    kept = {"a@1": "recent", "a@2": "recent"}
    assert answer(shop, None, dry_run=True) == ([], kept, [stranger])
    assert answer(shop, None) == ([], kept, [stranger])
    assert answer(shop, None) == ([], kept, [])


def test_one_adapter_alone(shop: Shop) -> None:
    stock(shop, "a", 3)
    stock(shop, "b", 3)
    assert answer(shop, 1, name="a")[0] == ["a@1"]
    assert numbers(shop, "b") == [1, 2, 3]
    with pytest.raises(NotFound):
        collect(shop.store, shop.registry, 1, name="c")


def test_bytes_that_another_adapter_has_too_stay(shop: Shop) -> None:
    stock(shop, "a", 4)
    stock(shop, "b", 1)
    deleted, _, swept = answer(shop, 1)
    assert deleted == ["a@1", "a@2"]
    assert swept == []
    assert shop.store.path(shop.registry.resolve("b").digest).is_dir()


def test_shadows_and_jobs_that_have_not_ended_hold(shop: Shop) -> None:
    stock(shop, "a", 6)
    write(shop, schema.alias_shadows, adapter="a", alias="default", number=1, percent=10)
    now = datetime.now(UTC)
    digest = shop.registry.resolve("a", "3").digest
    job = {"kind": "x", "state": "running", "created_at": now}
    write(shop, schema.jobs, id="1", params={"parents": [{"from": "a@2"}]}, progress={}, **job)
    write(shop, schema.jobs, id="2", params={}, progress={"at": 3}, result={"digest": digest}, **job)
    write(shop, schema.jobs, id="3", params={"from": "a@4"}, progress={}, ended_at=now, **job)
    _, kept, _ = answer(shop, 1, dry_run=True)
    assert kept == {"a@1": "shadow", "a@2": "job", "a@3": "job", "a@5": "rollback", "a@6": "recent"}
    assert answer(shop, 1)[0] == ["a@4"]
    with shop.registry._database.write() as connection:
        connection.execute(update(schema.jobs).values(ended_at=now))
    assert answer(shop, 1)[0] == ["a@2", "a@3"]


def test_a_job_that_brings_a_version_holds_none(shop: Shop) -> None:
    """Trimming happens inside of it."""
    stock(shop, "a", 4)
    params = {"name": "a", "source": "file:///a", "lineage": {"parents": ["a@1"]}}
    job = {"kind": "fetch", "state": "running", "created_at": datetime.now(UTC)}
    write(shop, schema.jobs, id="1", params=params, progress={}, **job)
    assert answer(shop, 1, dry_run=True)[1] == {"a@1": "job", "a@3": "rollback", "a@4": "recent"}


def test_a_deletion_that_was_interrupted_is_finished(shop: Shop) -> None:
    stock(shop, "a", 2)
    shop.registry.set_state("a", 1, DRAINING)
    assert answer(shop, None, dry_run=True) == ([], {"a@1": "recent", "a@2": "recent"}, [])
    assert numbers(shop, "a") == [1, 2]
    collect(shop.store, shop.registry, None)
    assert numbers(shop, "a") == [2]
    assert len(shop.store.digests()) == 1


def test_nothing_moves_to_a_version_that_goes(shop: Shop) -> None:
    """Judging and marking are one step: an alias that comes later finds it draining."""
    stock(shop, "a", 3)
    judged = shop.registry.retire("a", 1)
    assert [each.version.number for each in judged if each.goes] == [1]
    with pytest.raises(Exception, match="can only move to a ready version"):
        shop.registry.set_alias("a", "late", 1)
