"""kill -9 at any step of an upload, a deletion or a collection: after the next start each version is there whole or not
at all, on a disk and in a bucket."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from adapters.base import BaseModel
from adapters.collect import finish
from adapters.verify import verify
from tests.adapters.crash_child import RANDOM_INSTANTS, Opened, open_at, upload
from tests.adapters.factories import write_base

REPOSITORY = Path(__file__).parents[2]
OLD = ("old@1", "old@2", "old@3")


def crash_everywhere(tmp_path: Path, kind: str, action: str) -> tuple[BaseModel, list[Path]]:
    base = BaseModel.read(write_base(tmp_path / "tiny"))
    template, work = tmp_path / "template", tmp_path / "work"
    template.mkdir()
    opened = open_at(template, base, kind)
    for seed in (1, 2, 3):
        upload(opened, "old", seed)
    opened.registry.close()
    arguments = [str(template), str(base.path), str(work), kind, action]
    subprocess.run([sys.executable, "-m", "tests.adapters.crash_child", *arguments], cwd=REPOSITORY, check=True)
    return base, sorted(work.iterdir(), key=lambda path: int(path.name))


def whole_versions(opened: Opened) -> set[str]:
    """Those that are registered, after checking that the store holds these, whole, and nothing else."""
    assert verify(opened.store, opened.registry).findings == ()
    assert set(opened.store.digests()) == opened.registry.digests()
    versions = [version for adapter in opened.registry.adapters() for version in adapter.versions]
    for version in versions:
        assert opened.store.path(version.digest).is_dir()
    return {version.ref for version in versions}


@pytest.mark.parametrize("kind", ["disk", "bucket"])
@pytest.mark.parametrize(
    ("action", "before", "after"),
    [
        ("upload", {*OLD}, {*OLD, "new@1"}),
        ("forget", {*OLD}, {"old@2", "old@3"}),
        ("collect", {*OLD}, {"old@2", "old@3"}),
    ],
)
def test_killed_anywhere_it_is_whole_or_gone(
    tmp_path: Path, kind: str, action: str, before: set[str], after: set[str]
) -> None:
    base, roots = crash_everywhere(tmp_path, kind, action)
    assert len(roots) > RANDOM_INSTANTS + 10
    outcomes: list[set[str]] = []
    for root in roots:
        opened = open_at(root, base, kind)
        opened.ingest.sweep()
        finish(opened.store, opened.registry)
        outcomes.append(whole_versions(opened))
        if action == "upload":
            upload(opened)
            assert whole_versions(opened) == after
        opened.registry.close()
    steps = outcomes[:-RANDOM_INSTANTS]
    turn = steps.index(after)
    assert steps == [before] * turn + [after] * (len(steps) - turn)
    assert 0 < turn < len(steps) - 1
    assert all(outcome in (before, after) for outcome in outcomes)
