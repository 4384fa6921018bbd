"""Filters, pages and overviews: the same answer as looking at every version, on both databases."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import event

from adapters.errors import Changed, NotFound
from adapters.listing import Wanted
from adapters.registry import Registry
from adapters.tags import condition
from tests.adapters.test_registry import manifest


@pytest.fixture
def registry(database_url: str) -> Iterator[Registry]:
    registry = Registry(database_url)
    registry.add_version("pirate", manifest("1"), tags={"team": "sea", "stage": "old"})
    registry.add_version("pirate", replace(manifest("2"), kind="ia3"), tags={"team": "sea", "stage": "prod"})
    registry.add_version("pirate-2", replace(manifest("3"), base_model="other"), tags={"stage": "prod"})
    registry.add_version("Parrot", manifest("4"), description="speaks", tags={"stage": ""})
    registry.add_version("gone", manifest("5"), tags={"team": "sea"})
    registry.remove_version("gone", 1, with_aliases=True)
    registry.edit("pirate-2", tags={"owner": "ann"})
    registry.set_state("pirate", 1, "quarantined", "NaN")
    yield registry
    registry.close()


def wanted(*tags: str, **more: Any) -> Wanted:
    return Wanted(tags=tuple(condition(each) for each in tags), **more)


@pytest.mark.parametrize(
    ("asked", "names"),
    [
        (wanted(), {"Parrot", "pirate", "pirate-2"}),
        (wanted(name="pirate"), {"pirate"}),
        (wanted(name="pirate*"), {"pirate", "pirate-2"}),
        (wanted(name="pirate-*"), {"pirate-2"}),
        (wanted(name="p*"), {"pirate", "pirate-2"}),
        (wanted(name="*"), {"Parrot", "pirate", "pirate-2"}),
        (wanted(name="p%*"), set()),
        (wanted("team=sea"), {"pirate"}),
        (wanted("team"), {"pirate"}),
        (wanted("stage"), {"Parrot", "pirate", "pirate-2"}),
        (wanted("stage="), {"Parrot"}),
        (wanted("stage=prod"), {"pirate", "pirate-2"}),
        (wanted("stage=prod", "owner"), {"pirate-2"}),
        (wanted("owner", "team"), set()),
        (wanted(state="quarantined"), {"pirate"}),
        (wanted(state="nonsense"), set()),
        (wanted(kind="lora"), {"Parrot", "pirate", "pirate-2"}),
        (wanted(kind="ia3", state="quarantined"), set()),
        (wanted(kind="ia3", state="ready"), {"pirate"}),
        (wanted(base="other"), {"pirate-2"}),
        (wanted("stage=prod", name="pirate*", state="ready", base="tiny"), {"pirate"}),
    ],
)
def test_a_filter_finds_what_it_says(registry: Registry, asked: Wanted, names: set[str]) -> None:
    found = registry.adapters(asked)
    assert {adapter.name for adapter in found} == names
    assert found == [adapter for adapter in registry.adapters() if adapter.name in names]
    overviews = registry.overviews(asked)
    assert [each.name for each in overviews] == [each.name for each in found]
    pages, after = [], ""
    while page := registry.adapters(asked, after=after, limit=1):
        pages += page
        after = page[0].name
    assert pages == found


@pytest.mark.parametrize(
    ("asked", "numbers"),
    [
        (wanted(), [1, 2]),
        (wanted(state="ready"), [2]),
        (wanted("team=sea"), [1, 2]),
        (wanted("team", "stage=prod"), [2]),
        (wanted("stage=old", state="ready"), []),
    ],
)
def test_the_versions_of_a_name_are_filtered_too(registry: Registry, asked: Wanted, numbers: list[int]) -> None:
    whole = registry.adapter("pirate")
    page = registry.page("pirate", asked)
    assert page == replace(
        whole,
        versions=tuple(each for each in whole.versions if each.number in numbers),
        tagged={number: tags for number, tags in whole.tagged.items() if number in numbers},
    )
    assert [each.number for each in registry.page("pirate", asked, after=1).versions] == [n for n in numbers if n > 1]
    assert [each.number for each in registry.page("pirate", asked, limit=1).versions] == numbers[:1]
    with pytest.raises(NotFound):
        registry.page("nobody", asked)


def test_an_overview_counts_the_versions(registry: Registry) -> None:
    overview = registry.overview("pirate")
    assert (overview.counts, overview.latest) == ({"quarantined": 1, "ready": 1}, 2)
    adapter = registry.adapter("pirate")
    assert (overview.aliases, overview.splits, overview.tags) == (adapter.aliases, adapter.splits, adapter.tags)
    assert (overview.created_at, overview.revision) == (adapter.created_at, adapter.revision)
    with pytest.raises(NotFound):
        registry.overview("gone")


def test_served_is_whose_default_has_a_ready_version(registry: Registry) -> None:
    registry.set_state("Parrot", 1, "quarantined")
    assert {each.name for each in registry.served()} == {"pirate", "pirate-2"}
    assert [each.name for each in registry.served("pirate")] == ["pirate"]
    assert registry.served("Parrot") == []


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_list_is_found_by_an_index_and_in_its_order(registry: Registry) -> None:
    """SQLite tells its plan in words."""
    asked: list[tuple[str, Any]] = []
    event.listen(
        registry._database._engine,
        "before_cursor_execute",
        lambda _c, _u, statement, parameters, _x, _m: asked.append((statement, parameters)),
    )
    for each in (
        wanted(),
        wanted("team=sea"),
        wanted("team"),
        wanted(state="ready"),
        wanted(kind="ia3"),
        wanted(base="x"),
    ):
        asked.clear()
        registry.overviews(each, limit=5)
        statement, parameters = next(found for found in asked if found[0].startswith("SELECT"))
        with registry._database.read() as connection:
            plan = [row[3] for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters)]
        assert [step for step in plan if step.startswith("SCAN") or "TEMP B-TREE" in step] == [], plan


CHANGES: list[Callable[[Registry, Any], object]] = [
    lambda registry, seen: registry.set_alias("pirate", "blue", 2, expected=seen),
    lambda registry, seen: registry.remove_alias("pirate", "green", expected=seen),
    lambda registry, seen: registry.rollback("pirate", "green", expected=seen),
    lambda registry, seen: registry.edit("pirate", description="new", expected=seen),
    lambda registry, seen: registry.edit("pirate", 2, tags={"x": "y"}, expected=seen),
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_may_expect_a_revision(registry: Registry, change: Callable[[Registry, Any], object]) -> None:
    registry.add_version("pirate", manifest("6"))
    for number in (2, 3):
        registry.set_alias("pirate", "green", number)
    seen = registry.adapter("pirate").revision
    before = registry.adapters()
    with pytest.raises(Changed, match=f"revision {seen}, expected was {seen - 1}"):
        change(registry, {seen - 1})
    assert registry.adapters() == before
    change(registry, {seen - 1, seen})
    with pytest.raises(Changed):
        change(registry, {seen})


def test_a_change_answers_the_revision_that_it_made(registry: Registry) -> None:
    moved = registry.set_alias("pirate", "blue", 2)
    assert moved.revision == registry.adapter("pirate").revision == registry.alias("pirate", "blue").revision
    assert registry.remove_alias("pirate", "blue", expected=frozenset({moved.revision})).revision > moved.revision
