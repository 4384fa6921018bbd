"""Tags: spelled alike, bounded, and gone with what they are of."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from adapters.errors import InvalidAdapter, NotFound
from adapters.registry import Registry
from adapters.tags import MAX_VALUE, MOST_TAGS
from tests.adapters.test_registry import manifest


@pytest.fixture
def registry(database_url: str) -> Iterator[Registry]:
    registry = Registry(database_url)
    registry.add_version("a", manifest("1"), tags={"team": "search"})
    yield registry
    registry.close()


def test_an_adapter_and_its_versions_have_tags_of_their_own(registry: Registry) -> None:
    registry.add_version("a", manifest("2"))
    registry.edit("a", tags={"owner": "ann", "empty": ""})
    registry.edit("a", 1, tags={"stage": "prod", "team": None})
    adapter = registry.adapter("a")
    assert (adapter.tags, adapter.tags_of(1), adapter.tags_of(2)) == (
        {"owner": "ann", "empty": ""},
        {"stage": "prod"},
        {},
    )
    assert registry.adapters() == [adapter]
    assert registry.about(registry.resolve("a", "1")).tags == {"stage": "prod"}


def test_a_description_stays_unless_it_is_named(registry: Registry) -> None:
    registry.edit("a", description="the first")
    registry.edit("a", tags={"x": "y"})
    assert registry.adapter("a").description == "the first"
    registry.edit("a", description=None)
    assert registry.adapter("a").description is None


def test_tags_go_with_their_version_and_with_their_adapter(registry: Registry) -> None:
    registry.edit("a", tags={"owner": "ann"})
    registry.add_version("a", manifest("2"), tags={"x": "y"})
    registry.remove_version("a", 1)
    assert registry.adapter("a").tagged == {0: {"owner": "ann"}, 2: {"x": "y"}}
    registry.remove_version("a", 2, with_aliases=True)
    registry.add_version("a", manifest("1"))
    assert registry.adapter("a").tagged == {}


@pytest.mark.parametrize("key", ["", "-a", "a b", "ä", "a=b", "k" * 65, "\0"])
def test_a_key_that_cannot_be(registry: Registry, key: str) -> None:
    with pytest.raises(InvalidAdapter) as error:
        registry.edit("a", tags={key: "x"})
    assert error.value.code == "bad_tags"


@pytest.mark.parametrize("value", ["x" * (MAX_VALUE + 1), "two\nlines", "nul\0", "\ud800"])
def test_a_value_that_cannot_be(registry: Registry, value: str) -> None:
    with pytest.raises(InvalidAdapter) as error:
        registry.add_version("a", manifest("2"), tags={"k": value})
    assert error.value.code == "bad_tags"
    assert len(registry.adapter("a").versions) == 1


def test_there_are_so_many_tags_and_no_more(registry: Registry) -> None:
    registry.edit("a", tags={f"k{number}": "" for number in range(MOST_TAGS)})
    with pytest.raises(InvalidAdapter, match="65 tags, at most 64"):
        registry.edit("a", tags={"one": "more"}, description="not this either")
    assert registry.adapter("a").description is None
    registry.edit("a", tags={"k0": None, "one": "more"})
    assert len(registry.adapter("a").tags) == MOST_TAGS


def test_only_what_is_there_is_tagged(registry: Registry) -> None:
    with pytest.raises(NotFound):
        registry.edit("a", 7, tags={"x": "y"})
    with pytest.raises(NotFound):
        registry.edit("b", tags={"x": "y"})


def test_every_change_is_counted(registry: Registry) -> None:
    counted = [registry.adapter("a").revision]
    for change in (
        lambda: registry.edit("a", tags={"x": "y"}),
        lambda: registry.add_version("a", manifest("2")),
        lambda: registry.set_alias("a", "default", 1),
        lambda: registry.rollback("a"),
        lambda: registry.set_state("a", 1, "quarantined"),
        lambda: registry.remove_version("a", 1),
    ):
        change()
        counted.append(registry.adapter("a").revision)
    assert len(set(counted)) == len(counted) == 7
    assert counted == sorted(counted)
    assert registry.about(registry.resolve("a")).revision == counted[-1]
