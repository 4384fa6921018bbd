"""What a merge leaves that was refused for its loss, who takes it up, and when it goes."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from adapters.errors import MergeError, Unfaithful
from adapters.merge.apply import write_merged
from adapters.merge.plan import MergePlan, plan_merge
from adapters.merge.unfinished import KEPT_DAYS, STATE
from adapters.merge.verify import FILE
from tests.adapters.merge.by_hand import base_of_ones, rank_one

SHARD = "model.safetensors"


@pytest.fixture
def plan(tmp_path: Path) -> MergePlan:
    return plan_merge(rank_one(tmp_path / "a"), base_of_ones(tmp_path), "original")


def refused(plan: MergePlan, out: Path) -> Path:
    """Where it waits."""

    def check(directory: Path) -> Mapping[str, Any]:
        (directory / FILE).write_text("the report")
        raise Unfaithful("too far")

    with pytest.raises(Unfaithful):
        write_merged(plan, out, check=check)
    assert not out.exists()
    return out.with_name(f".{out.name}.merging")


def accepted(directory: Path) -> Mapping[str, Any]:
    return {"found": (directory / FILE).read_text() if (directory / FILE).exists() else "nothing"}


def age(place: Path, days: float) -> None:
    then = time.time() - days * 24 * 3600
    os.utime(place / STATE, (then, then))


def test_whoever_accepts_it_gets_the_same_files_and_finds_the_report(plan: MergePlan, tmp_path: Path) -> None:
    place = refused(plan, tmp_path / "out")
    written = (place / SHARD).stat()
    assert write_merged(plan, tmp_path / "out", check=accepted)["fidelity"] == {"found": "the report"}
    found = (tmp_path / "out" / SHARD).stat()
    assert (found.st_ino, found.st_mtime_ns) == (written.st_ino, written.st_mtime_ns), "not written again"
    assert not place.exists()
    assert not (tmp_path / "out" / STATE).exists()


def test_another_merge_to_the_same_place_begins_anew(plan: MergePlan, tmp_path: Path) -> None:
    refused(plan, tmp_path / "out")
    other = plan_merge(rank_one(tmp_path / "b", lora_alpha=2), plan.base, "original")
    assert write_merged(other, tmp_path / "out", check=accepted)["fidelity"] == {"found": "nothing"}


def test_what_would_fail_again_leaves_nothing(plan: MergePlan, tmp_path: Path) -> None:
    def check(directory: Path) -> Mapping[str, Any]:
        raise MergeError("broken")

    with pytest.raises(MergeError, match="broken"):
        write_merged(plan, tmp_path / "out", check=check)
    assert not list(tmp_path.glob(".*"))


def test_it_goes_when_a_merge_begins_beside_it_after_a_week(plan: MergePlan, tmp_path: Path) -> None:
    old, young, own = (refused(plan, tmp_path / name) for name in ("old", "young", "own"))
    age(old, KEPT_DAYS + 0.1)
    age(young, KEPT_DAYS - 0.1)
    age(own, KEPT_DAYS + 0.1)
    assert write_merged(plan, tmp_path / "own", check=accepted)["fidelity"] == {"found": "the report"}, "taken up"
    assert (old.exists(), young.exists()) == (False, True)


def test_what_somebody_is_at_stays_however_old(plan: MergePlan, tmp_path: Path) -> None:
    old = refused(plan, tmp_path / "old")
    age(old, 2 * KEPT_DAYS)
    held = os.open(old, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        write_merged(plan, tmp_path / "out")
        assert old.exists()
    finally:
        os.close(held)
