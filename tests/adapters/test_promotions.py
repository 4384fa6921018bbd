from __future__ import annotations

from collections.abc import Iterator

import pytest

from adapters import promotions as told
from adapters.errors import NotFound
from adapters.promotions import ADVISED, BUILDING, DEMOTED, FAILED, MEASURING, SERVING, WITHDRAWN, Promotions
from adapters.registry import Registry


@pytest.fixture
def registry(database_url: str) -> Iterator[Registry]:
    registry = Registry(database_url)
    yield registry
    registry.close()


@pytest.fixture
def stories(registry: Registry) -> Promotions:
    return Promotions(registry.database, "here")


def test_a_story_from_beginning_to_end(stories: Promotions) -> None:
    begun = stories.begin("a", 3, BUILDING, "a@3 has 60 %", job="job-1", figures={"share": 0.6}, at=1000.0)
    assert (begun.ref, begun.state, begun.origin, begun.server) == ("a@3", BUILDING, "policy", "here")
    assert begun.created_at.timestamp() == 1000.0
    assert begun.switched_at is None
    stories.change(begun.id, "built in 9 s", state=MEASURING, figures={"build_s": 9.0}, at=1010.0)
    stories.change(begun.id, "1.4 times as fast", state=SERVING, at=1020.5)
    stories.change(begun.id, "its engine was lost and is built again", job="job-2", at=1030.0)
    ended = stories.change(begun.id, "a@3 has 2 %", state=DEMOTED, at=2000.0)
    assert ended == stories.promotion(begun.id)
    assert (ended.state, ended.reason, ended.job, ended.has_ended) == (DEMOTED, "a@3 has 2 %", "job-2", True)
    assert ended.figures == {"share": 0.6, "build_s": 9.0}
    assert (ended.switched_at and ended.switched_at.timestamp()) == 1010.0
    assert (ended.ended_at and ended.ended_at.timestamp()) == 2000.0
    assert [(event["at"], event["message"]) for event in ended.events] == [
        (1000.0, "a@3 has 60 %"),
        (1010.0, "built in 9 s"),
        (1020.5, "1.4 times as fast"),
        (1030.0, "its engine was lost and is built again"),
        (2000.0, "a@3 has 2 %"),
    ]


def test_lists_are_filtered_and_paged_the_newest_first(stories: Promotions, registry: Registry) -> None:
    elsewhere = Promotions(registry.database, "there")
    first = stories.begin("a", 1, SERVING, "why")
    second = elsewhere.begin("b", 1, BUILDING, "why")
    third = stories.begin("a", 2, ADVISED, "why")
    stories.change(third.id, "no more", state=WITHDRAWN)

    def ids(**asked: object) -> list[str]:
        return [each.id for each in stories.promotions(**asked)]  # type: ignore[arg-type]

    newest = sorted([first.id, second.id, third.id], reverse=True)
    assert ids() == newest
    assert ids(limit=1) == newest[:1]
    assert ids(after=newest[0], limit=1) == newest[1:2]
    assert ids(state=BUILDING) == [second.id]
    assert set(ids(adapter="a")) == {first.id, third.id}
    assert ids(ended=True) == [third.id]
    assert set(ids(ended=False)) == {first.id, second.id}
    assert [each.id for each in stories.mine()] == [first.id]
    assert [each.id for each in elsewhere.mine()] == [second.id]


@pytest.mark.parametrize("odd", ["promo-none", "", "x" * 1000, "a\0b", "ä"])
def test_one_that_is_not_there(stories: Promotions, odd: str) -> None:
    with pytest.raises(NotFound, match="there is no promotion"):
        stories.promotion(odd)


def test_only_the_last_that_ended_are_kept(stories: Promotions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(told, "KEPT", 2)
    standing = stories.begin("a", 1, SERVING, "why")
    ended = []
    for number in range(2, 6):
        begun = stories.begin("a", number, BUILDING, "why")
        ended.append(stories.change(begun.id, "no", state=FAILED).id)
    assert {each.id for each in stories.promotions(ended=True)} == set(sorted(ended)[-2:])
    assert stories.promotion(standing.id).state == SERVING


def test_a_long_story_keeps_its_beginning_and_its_end(stories: Promotions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(told, "EVENTS_KEPT", 3)
    begun = stories.begin("a", 1, SERVING, "why")
    for number in range(5):
        stories.change(begun.id, f"event {number}")
    assert [each["message"] for each in stories.promotion(begun.id).events] == ["why", "event 3", "event 4"]
