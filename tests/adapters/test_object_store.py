"""What only a bucket has: several machines, copies, and files that come before their mark."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest

from adapters.archive import UploadLimits
from adapters.base import BaseModel
from adapters.errors import StoreError, StoreUnreachable
from adapters.ingest import Ingest
from adapters.object_store import ObjectStore
from adapters.registry import Registry
from adapters.store import digest_files
from tests.adapters.factories import AdapterFiles, lora_tensors
from tests.adapters.test_store import CONTENT, damage, fill, publish

DAMAGED_COPY = "the copy on this machine is damaged"


@pytest.fixture
def url(s3: Callable[[], str]) -> str:
    return s3()


@pytest.fixture
def here(url: str, tmp_path: Path) -> ObjectStore:
    return ObjectStore(url, tmp_path / "here", grace_s=0)


@pytest.fixture
def elsewhere(url: str, tmp_path: Path) -> ObjectStore:
    """The same bucket, seen from another machine."""
    return ObjectStore(url, tmp_path / "elsewhere", grace_s=0)


def objects(url: str) -> list[str]:
    system, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
    return [path.removeprefix(root) for path in sorted(system.find(root))]


def put(url: str, content: bytes) -> None:
    with fsspec.open(url, "wb") as file:
        file.write(content)


def test_the_bucket_looks_as_the_docstring_says(here: ObjectStore, url: str) -> None:
    here.claim("us")
    name = publish(here)[0].removeprefix("sha256:")
    assert objects(url) == [f"/blobs/{name}/one.json", f"/blobs/{name}/two.bin", "/registry", f"/whole/{name}"]
    here.delete(f"sha256:{name}")
    assert objects(url) == ["/registry"]


def test_another_machine_fetches_a_blob_once_however_many_ask(
    here: ObjectStore, elsewhere: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest, _ = publish(here)
    assert elsewhere.at_hand(digest) is None
    fetched: list[str] = []
    get = elsewhere._bucket.get

    def counting(path: str, file: Path) -> None:
        fetched.append(file.name)
        get(path, file)

    monkeypatch.setattr(elsewhere._bucket, "get", counting)
    paths: list[Path] = []
    threads = [threading.Thread(target=lambda: paths.append(elsewhere.path(digest))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(paths) == 6
    assert set(paths) == {elsewhere.at_hand(digest)}
    assert {path.name: path.read_bytes() for path in paths[0].iterdir()} == CONTENT
    assert sorted(fetched) == ["one.json", "two.bin"]


def test_a_damaged_blob_is_not_fetched(here: ObjectStore, elsewhere: ObjectStore, tmp_path: Path) -> None:
    digest, _ = publish(here)
    damage(here, digest)
    with pytest.raises(StoreError, match="damaged"):
        elsewhere.path(digest)
    assert elsewhere.at_hand(digest) is None
    assert list((tmp_path / "elsewhere" / "staging").iterdir()) == []


def test_a_blob_of_which_a_file_is_gone_is_not_fetched(here: ObjectStore, elsewhere: ObjectStore) -> None:
    digest, _ = publish(here)
    here._bucket.remove(f"blobs/{digest.removeprefix('sha256:')}/one.json")
    with pytest.raises(StoreError, match="damaged"):
        elsewhere.path(digest)


@pytest.mark.parametrize("mark", [b"", b"{", b"[]", b'{"../../one.json": "0"}'])
def test_without_a_whole_mark_there_is_no_blob_and_publishing_makes_it_one(
    here: ObjectStore, elsewhere: ObjectStore, url: str, mark: bytes
) -> None:
    with here.staging() as staged:
        digest = fill(staged)
        here.prepare(staged, digest)
        put(f"{url}/whole/{digest.removeprefix('sha256:')}", mark)
        with pytest.raises(StoreError, match="missing"):
            elsewhere.path(digest)
        here.publish(staged, digest)
    assert digest_files(elsewhere.path(digest))[0] == digest


def test_a_killed_upload_is_taken_up_by_the_next_one(here: ObjectStore, url: str) -> None:
    with here.staging() as staged:
        digest = fill(staged)
    name = digest.removeprefix("sha256:")
    put(f"{url}/blobs/{name}/two.bin", b"\x00")  # cut off
    put(f"{url}/blobs/{name}/other", b"of an older release")
    assert publish(here)[0] == digest
    assert here.hashes(digest).keys() == CONTENT.keys()
    assert here.mend(digest, here.hashes(digest)) == []


def test_young_files_are_not_swept(url: str, tmp_path: Path) -> None:
    """Another machine may be about to register them."""
    store = ObjectStore(url, tmp_path / "here")
    digest, _ = publish(store)
    with store.staging() as staged:
        other = fill(staged, {"a": b"a"})
        store.prepare(staged, other)
        assert store.sweep(set()) == [digest], "its copy on this machine"
        assert store.digests() == [digest]
        ObjectStore(url, tmp_path / "here", grace_s=0).sweep({digest})
        assert len(objects(url)) == 3
    assert digest_files(store.path(digest))[0] == digest


def test_a_half_written_part_is_swept(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/bucket"
    store = ObjectStore(url, tmp_path / "here", grace_s=0)
    digest, _ = publish(store)
    put(f"{url}/parts/1", b"half")
    assert ObjectStore(url, tmp_path / "here").leftovers({digest}) == []
    assert store.leftovers({digest}) == store.sweep({digest}) == ["parts/1"]
    assert store.leftovers({digest}) == []
    assert digest_files(store.path(digest))[0] == digest


def test_a_damaged_copy_is_fetched_anew(here: ObjectStore) -> None:
    digest, path = publish(here)
    (path / "two.bin").write_bytes(b"\x00\x02")
    assert here.mend(digest, here.hashes(digest), dry_run=True) == [DAMAGED_COPY]
    assert here.mend(digest, here.hashes(digest)) == [DAMAGED_COPY]
    assert here.mend(digest, here.hashes(digest)) == []
    assert digest_files(here.path(digest))[0] == digest


def test_a_damaged_blob_is_sent_anew_from_a_whole_copy(here: ObjectStore, elsewhere: ObjectStore, url: str) -> None:
    digest, _ = publish(here)
    damage(here, digest)
    here.mend(digest, here.hashes(digest), dry_run=True)
    assert elsewhere.mend(digest, elsewhere.hashes(digest)) == []
    assert here.mend(digest, here.hashes(digest)) == [
        f"the files in {url} are damaged or gone, the copy on this machine is whole"
    ]
    assert digest_files(elsewhere.path(digest))[0] == digest


def test_files_that_were_copied_into_the_bucket_become_a_blob(here: ObjectStore, url: str, tmp_path: Path) -> None:
    """As `aws s3 sync` moves a local store: it copies no marks."""
    (tmp_path / "old").mkdir()
    digest = fill(tmp_path / "old")
    for name, content in CONTENT.items():
        put(f"{url}/blobs/{digest.removeprefix('sha256:')}/{name}", content)
    assert here.mend(digest, here.hashes(digest)) == [f"the files in {url} are whole, but not marked so"]
    assert digest_files(here.path(digest))[0] == digest


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("s3://no-such-bucket/x", "The specified bucket does not exist"),
        ("nothing://x", "Protocol not known: nothing"),
        ("s3:///x", "s3:///x could not"),
    ],
)
def test_a_bucket_that_cannot_be_reached_says_so(
    url: str, complaint: str, s3: Callable[[], str], tmp_path: Path
) -> None:
    with pytest.raises(StoreUnreachable, match=complaint) as refused:
        ObjectStore(url, tmp_path).claim("us")
    assert "check store_url" in refused.value.message


def uploads(seed: int) -> AdapterFiles:
    return AdapterFiles(tensors=lora_tensors(seed=seed))


@pytest.fixture(params=["sqlite", "postgres"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/registry.db"
    fresh: str = request.getfixturevalue("postgres")()
    return fresh


def test_the_life_of_a_version_on_two_machines(
    database: str, here: ObjectStore, elsewhere: ObjectStore, tiny_base: BaseModel, url: str
) -> None:
    first, second = Registry(database), Registry(database)
    try:
        ours = Ingest(here, first, tiny_base, UploadLimits(), 16)
        theirs = Ingest(elsewhere, second, tiny_base, UploadLimits(), 16)
        version, created = ours.upload("a", uploads(1).uploads())
        assert created
        found = second.resolve("a")
        assert found == version
        assert digest_files(elsewhere.path(found.digest)) == (version.digest, version.manifest.files)
        assert theirs.sweep() == []
        theirs.forget("a", 1, with_aliases=True)
        assert objects(url) == ["/registry"]
        assert ours.sweep() == [version.digest], "the copy that was left here"
        assert here.at_hand(version.digest) is None
    finally:
        first.close()
        second.close()


def test_two_machines_upload_and_delete_the_same_bytes_at_once(
    database: str, here: ObjectStore, elsewhere: ObjectStore, tiny_base: BaseModel
) -> None:
    registries = [Registry(database), Registry(database)]
    failures: list[Exception] = []

    def churn(store: ObjectStore, registry: Registry) -> None:
        ingest = Ingest(store, registry, tiny_base, UploadLimits(), 16)
        name = f"a{os.path.basename(store._copies.location)}"
        try:
            for _ in range(4):
                version, _ = ingest.upload(name, uploads(1).uploads())
                assert digest_files(store.path(version.digest))[0] == version.digest
                assert version.digest in store.digests()
                ingest.forget(name, version.number, with_aliases=True)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=churn, args=pair) for pair in zip((here, elsewhere), registries, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for registry in registries:
        registry.close()
    assert failures == []
    assert here.digests() == []
    assert here.size_bytes() == 0
