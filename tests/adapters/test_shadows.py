"""Shadows in the registry: of ready versions only, gone when they are of no use, and kept by retention."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from adapters.errors import Conflict, InvalidAdapter, NotFound
from adapters.registry import Registry, Shadow
from tests.adapters.test_registry import manifest


@pytest.fixture
def registry(database_url: str) -> Iterator[Registry]:
    """Three versions of `a`, of which the last answers and the first is its shadow."""
    registry = Registry(database_url)
    for character in "123":
        registry.add_version("a", manifest(character))
    registry.set_alias("a", "default", shadow=Shadow(1, 10))
    yield registry
    registry.close()


def test_it_is_shown_everywhere(registry: Registry) -> None:
    shadow = Shadow(1, 10)
    assert registry.shadows() == {("a", "default"): shadow}
    assert registry.alias("a", "default").shadow == shadow
    assert registry.adapter("a").shadows == registry.overview("a").shadows == {"default": shadow}
    assert registry.adapters()[0].shadows == registry.page("a", limit=1).shadows == {"default": shadow}


def test_it_moves_nothing_and_is_no_move(registry: Registry) -> None:
    assert registry.resolve("a").number == 3
    assert [move.new for move in registry.moves("a", "default")] == [{3: 1}, {2: 1}, {1: 1}]


def test_it_goes_with_its_version(registry: Registry) -> None:
    registry.remove_version("a", 1)
    assert registry.shadows() == {}
    assert registry.adapter("a").aliases == {"default": 3}


def test_it_goes_with_its_alias(registry: Registry) -> None:
    registry.set_alias("a", "blue", 2, shadow=Shadow(1, 100))
    registry.remove_alias("a", "blue")
    assert registry.shadows() == {("a", "default"): Shadow(1, 10)}


def test_it_goes_when_the_alias_comes_to_it(registry: Registry) -> None:
    registry.set_alias("a", "default", {1: 1, 3: 9})
    assert registry.shadows() == {("a", "default"): Shadow(1, 10)}
    registry.set_alias("a", "default", 1)
    assert registry.shadows() == {}


def test_a_rollback_onto_it_takes_it_away(registry: Registry) -> None:
    registry.set_alias("a", "default", shadow=Shadow(2, 10))
    assert registry.rollback("a").aliases == {"default": 2}
    assert registry.shadows() == {}


def test_it_is_kept_by_retention(registry: Registry) -> None:
    assert [(each.version.number, each.reason) for each in registry.retire("a", 1, dry_run=True)] == [
        (1, "shadow"),
        (2, "rollback"),
        (3, "recent"),
    ]


def test_a_shadow_that_cannot_be(registry: Registry) -> None:
    registry.set_state("a", 2, "quarantined", "NaN")
    with pytest.raises(Conflict, match="a@2 is quarantined"):
        registry.set_alias("a", "default", shadow=Shadow(2, 10))
    with pytest.raises(Conflict, match="points to version 3 itself"):
        registry.set_alias("a", "default", shadow=Shadow(3, 10))
    with pytest.raises(NotFound):
        registry.set_alias("a", "blue", shadow=Shadow(1, 10))
    for percent in (0, 101, -1):
        with pytest.raises(InvalidAdapter, match="expected 1 to 100"):
            registry.set_alias("a", "default", shadow=Shadow(1, percent))
    with pytest.raises(NotFound):  # and the alias has not moved either
        registry.set_alias("a", "default", 1, shadow=Shadow(9, 10))
    assert registry.adapter("a").shadows == {"default": Shadow(1, 10)}
    assert registry.adapter("a").aliases == {"default": 3}
