"""What `verify` finds and what it puts right, on a disk and in a bucket."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest
from sqlalchemy import update

from adapters import schema
from adapters.archive import UploadLimits
from adapters.base import BaseModel
from adapters.ingest import Ingest
from adapters.local_store import LocalStore
from adapters.object_store import GRACE_S, ObjectStore
from adapters.records import FAILED, QUARANTINED, READY, Version
from adapters.registry import Registry
from adapters.store import Store
from adapters.verify import Finding, Report, verify
from tests.adapters.factories import AdapterFiles, lora_tensors
from tests.adapters.test_store import damage, publish

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return LocalStore(tmp_path / "store")
    return ObjectStore(request.getfixturevalue("s3")(), tmp_path / "store", grace_s=0)


@pytest.fixture
def upload(store: Store, registry: Registry, tiny_base: BaseModel) -> Callable[..., Version]:
    ingest = Ingest(store, registry, tiny_base, UploadLimits(), 16)

    def upload(name: str = "a", seed: int = 1) -> Version:
        return ingest.upload(name, AdapterFiles(tensors=lora_tensors(seed=seed)).uploads())[0]

    return upload


def lose(store: Store, digest: str) -> None:
    """Its files, where they are kept; not the copies that this machine may have."""
    system, root = fsspec.core.url_to_fs(store.location)
    system.rm(f"{root}/blobs/{digest.removeprefix('sha256:')}", recursive=True)


def forget_copies(store: Store, tmp_path: Path) -> None:
    if isinstance(store, ObjectStore):
        shutil.rmtree(tmp_path / "store" / "blobs")
        (tmp_path / "store" / "blobs").mkdir()


def state(registry: Registry, version: Version) -> tuple[str, str | None]:
    now = registry.resolve(version.adapter, str(version.number))
    return now.state, now.reason


def found(report: Report) -> list[tuple[str, tuple[str, ...], bool]]:
    return [(each.what, each.versions, each.repaired is not None) for each in report.findings]


def test_nothing_to_find(store: Store, registry: Registry, upload: Callable[..., Version]) -> None:
    assert verify(store, registry) == Report(0, 0, 0, ())
    one, two = upload("a", 1), upload("a", 2)
    upload("b", 1)
    steps: list[tuple[int, int, str]] = []
    report = verify(store, registry, progress=lambda *step: steps.append(step))
    assert report == Report(3, 2, one.manifest.size_bytes + two.manifest.size_bytes, ())
    assert report.sound
    assert [step[:2] for step in steps] == [(0, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(
    ("harm", "what", "reason"),
    [
        (lambda store, digest: damage(store, digest, WEIGHTS), "damaged", f"damaged (changed: {WEIGHTS})"),
        (lambda store, digest: damage(store, digest, "more"), "damaged", "damaged (changed: more)"),
        (lose, "missing", "missing"),
    ],
)
def test_broken_files_are_reported_and_the_version_is_not_served_until_they_are_whole(
    store: Store,
    registry: Registry,
    upload: Callable[..., Version],
    tmp_path: Path,
    harm: Callable[[Store, str], None],
    what: str,
    reason: str,
) -> None:
    version, other = upload("a", 1), upload("a", 2)
    upload("b", 1)
    saved = shutil.copytree(store.path(version.digest), tmp_path / "saved")
    harm(store, version.digest)
    forget_copies(store, tmp_path)

    looked = verify(store, registry)
    assert found(looked) == [(what, ("a@1", "b@1"), False)]
    assert looked.findings[0].detail == f"its files are {reason}"
    assert not looked.sound
    assert state(registry, version) == (READY, None), "without repair nothing changes"

    for _ in range(2):
        repaired = verify(store, registry, repair=True)
        assert found(repaired) == [(what, ("a@1", "b@1"), True)]
        assert not repaired.sound
        assert state(registry, version) == (FAILED, f"its files are {reason}")
        assert state(registry, other) == (READY, None)

    system, root = fsspec.core.url_to_fs(store.location)
    blob = f"{root}/blobs/{version.digest.removeprefix('sha256:')}"
    if system.exists(blob):
        system.rm(blob, recursive=True)
    for file in saved.iterdir():
        system.makedirs(blob, exist_ok=True)
        system.put_file(str(file), f"{blob}/{file.name}")
    assert found(verify(store, registry)) == [("whole", ("a@1", "b@1"), False)]
    again = verify(store, registry, repair=True)
    assert found(again) == [("whole", ("a@1", "b@1"), True)]
    assert again.sound
    assert state(registry, version) == (READY, None)
    assert verify(store, registry).findings == ()


def test_a_version_that_failed_for_another_reason_is_left_alone(
    store: Store, registry: Registry, upload: Callable[..., Version], tmp_path: Path
) -> None:
    failed, quarantined = upload("a", 1), upload("a", 2)
    registry.set_state("a", 1, FAILED, "it would not load")
    registry.set_state("a", 2, QUARANTINED, "it said NaN")
    assert verify(store, registry, repair=True).findings == ()
    lose(store, quarantined.digest)
    forget_copies(store, tmp_path)
    assert found(verify(store, registry, repair=True)) == [("missing", ("a@2",), True)]
    assert state(registry, failed) == (FAILED, "it would not load")
    assert state(registry, quarantined) == (QUARANTINED, "it said NaN")


def test_leftovers_are_reported_and_removed(store: Store, registry: Registry, tmp_path: Path) -> None:
    stranger, _ = publish(store)
    (tmp_path / "store" / "staging" / "leftover").mkdir()
    expected = [("extra", (), False)] * 2
    assert found(verify(store, registry)) == expected
    assert {each.digest for each in verify(store, registry).findings} == {stranger, "staging/leftover"}
    assert verify(store, registry, keep={stranger}).findings == (
        Finding("extra", "staging/leftover", (), "a crash left it"),
    )
    report = verify(store, registry, repair=True)
    assert found(report) == [("extra", (), True)] * 2
    assert report.sound
    assert store.digests() == []


def test_a_manifest_that_tells_of_other_files_is_reported(
    store: Store, registry: Registry, upload: Callable[..., Version]
) -> None:
    version = upload()
    told = version.manifest.to_json() | {"files": {WEIGHTS: "0" * 64}}
    with registry._database.write() as connection:
        connection.execute(update(schema.versions).values(manifest=told))
    for repair in (False, True):
        report = verify(store, registry, repair=repair)
        assert found(report) == [("manifest", ("a@1",), False)]
        assert not report.sound
    assert state(registry, version) == (READY, None), "its files are what its digest says"


def test_a_damaged_copy_is_no_harm_to_the_version(
    s3: Callable[[], str], registry: Registry, tiny_base: BaseModel, tmp_path: Path
) -> None:
    store = ObjectStore(s3(), tmp_path / "copies")
    ingest = Ingest(store, registry, tiny_base, UploadLimits(), 16)
    version, _ = ingest.upload("a", AdapterFiles().uploads())
    (store.path(version.digest) / WEIGHTS).write_bytes(b"")
    assert found(verify(store, registry)) == [("copy", ("a@1",), False)]
    assert verify(store, registry, repair=True).sound
    assert state(registry, version) == (READY, None)
    assert verify(store, registry).findings == ()


def test_uploads_and_deletions_beside_it_are_no_findings(
    store: Store, registry: Registry, tiny_base: BaseModel, upload: Callable[..., Version]
) -> None:
    ended = threading.Event()
    upload("stays", 5)
    if isinstance(store, ObjectStore):
        store._grace_s = GRACE_S

    def churn(seed: int) -> None:
        ingest = Ingest(store, registry, tiny_base, UploadLimits(), 16)
        while not ended.is_set():
            version, _ = ingest.upload(f"a{seed}", AdapterFiles(tensors=lora_tensors(seed=seed % 2)).uploads())
            ingest.forget(version.adapter, version.number, with_aliases=True)

    threads = [threading.Thread(target=churn, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(15):
            report = verify(store, registry)
            assert [each for each in report.findings if each.what != "extra"] == []
            assert [each.digest for each in report.findings if each.digest.startswith("sha256:")] == []
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def test_what_is_deleted_meanwhile_is_no_finding(
    store: Store, registry: Registry, upload: Callable[..., Version], monkeypatch: pytest.MonkeyPatch
) -> None:
    version = upload()
    hashes = store.hashes

    def slow(digest: str) -> object:
        registry.remove_version("a", 1, with_aliases=True)
        store.delete(version.digest)
        return hashes(digest)

    monkeypatch.setattr(store, "hashes", slow)
    assert verify(store, registry, repair=True).findings == ()
