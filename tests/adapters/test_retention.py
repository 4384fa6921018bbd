"""Cases whose answer is known by hand."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import pytest

from adapters.manifest import Manifest
from adapters.records import Adapter, Version
from adapters.retention import REASONS, Holds, judge

STATES = {"r": "ready", "q": "quarantined", "f": "failed", "d": "draining", "c": "checking", "m": "merge_only"}


def adapter(states: str, targets: Mapping[str, Mapping[int, int]] | None = None) -> Adapter:
    """`rrq`: versions 1 and 2 are ready, 3 is quarantined."""
    made = datetime(2026, 1, 1, tzinfo=UTC)
    versions = [
        Version("a", number, digest_of(number), STATES[state], None, made, manifest(number))
        for number, state in enumerate(states, 1)
    ]
    return Adapter("a", None, made, tuple(versions), targets or {})


def digest_of(number: int) -> str:
    return f"sha256:{number:064x}"


def manifest(number: int) -> Manifest:
    return Manifest(digest_of(number), 1, "lora", 8, 16.0, ("q_proj",), 1, 1, "F32", "tiny")


def said(states: str, keep: int | None, targets: Mapping[str, Mapping[int, int]] | None = None, **holds: Any) -> str:
    """A word a version: why it stays, or `-` for one that goes."""
    found = judge(adapter(states, targets), keep, Holds(**holds))
    assert [each.version.number for each in found] == list(range(1, len(states) + 1))
    return " ".join(each.reason or "-" for each in found)


@pytest.mark.parametrize(
    ("states", "keep", "expected"),
    [
        ("", 1, ""),
        ("r", 1, "recent"),
        ("rrr", None, "recent recent recent"),
        ("rrr", 5, "recent recent recent"),
        ("rrr", 3, "recent recent recent"),
        ("rrr", 2, "- recent recent"),
        ("rrr", 1, "- - recent"),
        # What cannot serve does not count, and stays while it is newer than what does.
        ("rrq", 1, "- recent recent"),
        ("rqf", 1, "recent recent recent"),
        ("qrr", 2, "- recent recent"),
        ("rfrr", 2, "- - recent recent"),
        ("fff", 1, "recent recent recent"),
        # Neither does what is on its way out; it is not deleted twice.
        ("rdr", 1, "- state recent"),
        ("rrd", 1, "- recent recent"),
        # What is still checked may fail: it replaces nothing yet.
        ("rrc", 1, "- recent recent"),
        ("rcr", 1, "- state recent"),
        ("rmm", 2, "- recent recent"),
    ],
)
def test_the_newest_that_can_serve_stay(states: str, keep: int | None, expected: str) -> None:
    assert said(states, keep) == expected


def test_aliases_hold_what_they_point_to() -> None:
    targets = {"default": {5: 1}, "stable": {1: 1}, "canary": {2: 90, 3: 10}}
    assert said("rrrrr", 1, targets) == "alias split split - recent"
    assert said("rrrrr", 1, {"default": {5: 1}, "one": {1: 1}, "both": {1: 1, 2: 1}}) == "alias split - - recent"
    assert said("frr", 1, {"stable": {1: 1}}) == "alias - recent"


def test_shadows_rollbacks_and_jobs_hold() -> None:
    assert said("rrrr", 1, shadows=frozenset({1})) == "shadow - - recent"
    assert said("rrrr", 1, rollbacks=frozenset({2})) == "- rollback - recent"
    assert said("rrrr", 1, named_by_jobs=frozenset({"a@2", "b@1", "sha256", digest_of(3)})) == "- job job recent"
    assert said("rrrr", 1, named_by_jobs=frozenset({"a"})) == "job job job recent"
    assert said("rrrr", 1, named_by_jobs=frozenset({"b", "a@9", "A"})) == "- - - recent"


def test_of_several_reasons_the_first_of_the_list_is_given() -> None:
    everything: Any = {"shadows": frozenset({1}), "rollbacks": frozenset({1}), "named_by_jobs": frozenset({"a@1"})}
    assert said("rr", 1, {"x": {1: 1}}, **everything) == "alias recent"
    assert said("rr", 1, **everything) == "shadow recent"
    assert said("rr", 2, {"x": {1: 1}}, **everything) == "recent recent"


def test_what_requests_use_stays() -> None:
    judged = judge(adapter("rrr"), 1, Holds(), lambda version: version.number == 2)
    assert [each.reason for each in judged] == [None, "leased", "recent"]
    assert [each.goes for each in judged] == [True, False, False]


def test_every_reason_that_is_given_is_explained() -> None:
    targets = {"default": {2: 1}, "canary": {3: 1, 4: 1}}
    holds: Any = {"shadows": frozenset({5}), "rollbacks": frozenset({6}), "named_by_jobs": frozenset({"a@7"})}
    judged = judge(adapter("dr" + "r" * 8, targets), 1, Holds(**holds), lambda version: version.number == 8)
    assert {each.reason for each in judged} == {None, *REASONS}
