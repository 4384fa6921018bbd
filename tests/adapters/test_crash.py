"""kill -9 at any step of an upload or a deletion: after the next start the adapter is there whole or not at all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from adapters.base import BaseModel
from adapters.local_store import LocalStore
from adapters.registry import Registry
from adapters.store import digest_files
from tests.adapters.crash_child import RANDOM_INSTANTS, open_ingest, upload
from tests.adapters.factories import AdapterFiles, write_base

REPOSITORY = Path(__file__).parents[2]


def crash_everywhere(tmp_path: Path, action: str) -> tuple[BaseModel, list[Path]]:
    base = BaseModel.read(write_base(tmp_path / "tiny"))
    template, work = tmp_path / "template", tmp_path / "work"
    template.mkdir()
    _, registry, ingest = open_ingest(template, base)
    ingest.upload("old", AdapterFiles().uploads())
    registry.close()
    arguments = [str(template), str(base.path), str(work), action]
    subprocess.run([sys.executable, "-m", "tests.adapters.crash_child", *arguments], cwd=REPOSITORY, check=True)
    return base, sorted(work.iterdir(), key=lambda path: int(path.name))


def whole_adapters(root: Path, store: LocalStore, registry: Registry) -> set[str]:
    """Names of the registered adapters, after checking that the store holds these, whole, and nothing else."""
    versions = [version for adapter in registry.adapters() for version in adapter.versions]
    for version in versions:
        assert digest_files(store.path(version.digest)) == (version.digest, version.manifest.files)
    assert {f"sha256:{blob.name}" for blob in (root / "store" / "blobs").iterdir()} == registry.digests()
    assert list((root / "store" / "staging").iterdir()) == []
    return {version.adapter for version in versions}


@pytest.mark.parametrize(
    ("action", "before", "after"), [("upload", {"old"}, {"old", "new"}), ("forget", {"old"}, set())]
)
def test_killed_anywhere_it_is_whole_or_gone(tmp_path: Path, action: str, before: set[str], after: set[str]) -> None:
    base, roots = crash_everywhere(tmp_path, action)
    assert len(roots) > RANDOM_INSTANTS + 10
    outcomes: list[set[str]] = []
    for root in roots:
        store, registry, ingest = open_ingest(root, base)
        ingest.sweep()
        outcomes.append(whole_adapters(root, store, registry))
        if action == "upload":
            upload(ingest)
            assert whole_adapters(root, store, registry) == after
        registry.close()
    steps = outcomes[:-RANDOM_INSTANTS]
    turn = steps.index(after)
    assert steps == [before] * turn + [after] * (len(steps) - turn)
    assert 0 < turn < len(steps) - 1
    assert all(outcome in (before, after) for outcome in outcomes)
