"""What references meant is used again only while it is right, whoever changes the registry, and in which process."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from adapters import rows
from adapters.errors import NotFound
from adapters.meanings import Meanings
from adapters.records import MERGE_ONLY, Version
from adapters.registry import Registry
from tests.adapters.test_registry import digest, manifest

REFS = (None, "stable", "latest", "1", "2", "3", "4", digest("1")[:19], "nightly")
CHANGES: dict[str, Callable[[Registry], object]] = {
    "add_version": lambda registry: registry.add_version("a", manifest("5")),
    "count_attempt": lambda registry: registry.count_attempt(registry.resolve("a", "4")),
    "admit": lambda registry: registry.admit(registry.resolve("a", "4"), {"effect": 1.0}),
    "reject": lambda registry: registry.reject(registry.resolve("a", "4"), "a reason"),
    "set_merge_report": lambda registry: registry.set_merge_report(registry.resolve("a", "1"), {}, {}),
    "edit": lambda registry: registry.edit("a", description="another"),
    "set_alias": lambda registry: registry.set_alias("a", "stable", {1: 1, 3: 1}),
    "rollback": lambda registry: registry.rollback("a"),
    "remove_alias": lambda registry: registry.remove_alias("a", "stable"),
    "set_state": lambda registry: registry.set_state("a", 3, "quarantined", "NaN"),
    "retire": lambda registry: registry.retire("a", 1),
    "drain": lambda registry: registry.drain("a"),
    "remove_version": lambda registry: registry.remove_version("a", 1),
}
"""A call of every method that changes an adapter."""
CHANGE_NO_ADAPTER = {"alone", "serving", "unserved", "close"}


@pytest.fixture
def two(database_url: str) -> Iterator[tuple[Registry, Registry]]:
    """`a` has three versions that are ready and one that is checked; `default` moved from 2 to 3, `stable` is 2."""
    here, elsewhere = Registry(database_url), Registry(database_url)
    for character in "123":
        here.add_version("a", manifest(character))
    here.set_alias("a", "stable", 2)
    here.add_version("a", manifest("4"), promote=False, probe=True)
    yield here, elsewhere
    here.close()
    elsewhere.close()


def meant(registry: Registry, ref: str | None) -> Version | str:
    try:
        return registry.resolve("a", ref, sticky="me")
    except NotFound as error:
        return error.message


def test_every_method_that_changes_an_adapter_is_tried_here() -> None:
    methods = {name for name, each in vars(Registry).items() if callable(each) and not name.startswith("_")}
    assert methods - CHANGE_NO_ADAPTER == set(CHANGES)


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_by_another_process_is_seen_by_the_next_look(
    two: tuple[Registry, Registry], change: str, database_url: str
) -> None:
    here, elsewhere = two
    for ref in REFS:
        meant(here, ref)
    CHANGES[change](elsewhere)
    assert [here.resolve_at_once("a", ref, sticky="me") for ref in REFS] == [None] * len(REFS)
    fresh = Registry(database_url)
    assert [meant(here, ref) for ref in REFS] == [meant(fresh, ref) for ref in REFS]
    fresh.close()


def test_the_adapter_that_comes_under_the_name_of_one_that_went_is_another_one(two: tuple[Registry, Registry]) -> None:
    here, elsewhere = two
    assert here.resolve("a", "2").digest == digest("2")
    for number in (1, 2, 3, 4):
        elsewhere.remove_version("a", number, with_aliases=True)
    assert here.resolve_at_once("a", "2") is None
    with pytest.raises(NotFound):
        here.resolve("a", "2")
    elsewhere.add_version("a", manifest("6"))
    assert here.resolve_at_once("a") is None
    assert here.resolve("a").digest == digest("6")


def test_what_has_not_changed_is_not_read_again(
    two: tuple[Registry, Registry], monkeypatch: pytest.MonkeyPatch
) -> None:
    here, elsewhere = two
    before = here.resolve("a")
    elsewhere.add_version("b", manifest("1"))
    monkeypatch.setattr(rows, "read_meant", None)
    assert here.resolve("a") == before


@pytest.fixture
def sqlite(registry: Registry) -> Registry:
    """Where a look takes microseconds."""
    for character in "12":
        registry.add_version("a", manifest(character))
    return registry


def test_at_once_is_what_was_found_before(sqlite: Registry) -> None:
    assert sqlite.resolve_at_once("a", "1") is None
    assert sqlite.resolve_at_once("a", "1") is None, "looking for it does not find it"
    found = sqlite.resolve("a", "1")
    assert sqlite.resolve_at_once("a", "1") == found
    assert sqlite.resolve_at_once("a") is None, "another reference of the same adapter"


def test_a_split_is_a_choice_for_each_request(sqlite: Registry) -> None:
    sqlite.set_alias("a", "default", {1: 1, 2: 1})
    of_user = sqlite.resolve("a", sticky="me")
    chosen = Counter(found.number for _ in range(100) if (found := sqlite.resolve_at_once("a")) is not None)
    assert set(chosen) == {1, 2}
    assert chosen.total() == 100
    assert [sqlite.resolve_at_once("a", sticky="me") for _ in range(20)] == [of_user] * 20


def test_whether_an_engine_answers_is_asked_each_time(sqlite: Registry) -> None:
    merge_only, _ = sqlite.add_version("a", replace(manifest("3"), merge_only="a reason"), promote=False)
    assert merge_only.state == MERGE_ONLY
    up = True
    sqlite.answers = lambda version: up
    sqlite.set_alias("a", "default", {2: 1, 3: 1_000_000})
    assert sqlite.resolve("a", sticky="me").number == 3
    assert sqlite.resolve_at_once("a", sticky="me") == merge_only
    up = False
    found = sqlite.resolve_at_once("a", sticky="me")
    assert found is not None
    assert found.number == 2


def test_those_used_last_are_kept(sqlite: Registry) -> None:
    adapter, meanings = sqlite.adapter("a"), Meanings(most=2)
    for ref in ("1", "2"):
        meanings.keep("a", ref, adapter)
    assert meanings.find("a", "1") is adapter
    meanings.keep("a", "3", adapter)
    assert [ref for ref in "123" if meanings.find("a", ref)] == ["1", "3"]
