"""What every store promises, on a disk, in memory, behind a file URL and on an S3 server: blobs appear whole, stay
unchanged and go whole."""

from __future__ import annotations

import hashlib
import stat
import threading
import uuid
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest

from adapters.errors import StoreError
from adapters.local_store import LocalStore
from adapters.object_store import ObjectStore
from adapters.store import Store, digest_files

CONTENT = {"one.json": b"{}", "two.bin": b"\x00\x01"}


@pytest.fixture(params=["local", "memory", "file", "s3"])
def open_store(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Store]:
    """Opens the same store each time. What it keeps on this machine is in `tmp_path/store`."""
    if request.param == "local":
        return lambda: LocalStore(tmp_path / "store")
    if request.param == "s3":
        url = f"{request.getfixturevalue('s3')()}/some/prefix"
    else:
        url = {"memory": f"memory://{uuid.uuid4()}", "file": f"file://{tmp_path}/bucket"}[request.param]
    return lambda: ObjectStore(url, tmp_path / "store", grace_s=0)


@pytest.fixture
def store(open_store: Callable[[], Store]) -> Store:
    return open_store()


def damage(store: Store, digest: str, file: str = "two.bin") -> None:
    """As long as before, with other bytes, where it is kept."""
    with fsspec.open(f"{store.location}/blobs/{digest.removeprefix('sha256:')}/{file}", "wb") as stream:
        stream.write(b"\x00\x02")


def fill(staged: Path, content: dict[str, bytes] = CONTENT) -> str:
    for name, data in content.items():
        (staged / name).write_bytes(data)
        (staged / name).chmod(0o600)
    return digest_files(staged)[0]


def publish(store: Store, content: dict[str, bytes] = CONTENT) -> tuple[str, Path]:
    with store.staging() as staged:
        digest = fill(staged, content)
        return digest, store.publish(staged, digest)


def staging_of(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "store" / "staging").iterdir())


def test_digest_is_over_names_and_bytes(tmp_path: Path) -> None:
    (tmp_path / "b").write_bytes(b"2")
    (tmp_path / "a").write_bytes(b"1")
    one, two = (hashlib.sha256(data).hexdigest() for data in (b"1", b"2"))
    listing = f'[["a","{one}"],["b","{two}"]]'
    assert digest_files(tmp_path) == (f"sha256:{hashlib.sha256(listing.encode()).hexdigest()}", {"a": one, "b": two})


def test_published_blob_has_the_bytes_and_is_readable_by_others(store: Store, tmp_path: Path) -> None:
    digest, path = publish(store)
    assert store.path(digest) == path == tmp_path / "store" / "blobs" / digest.removeprefix("sha256:")
    assert {file.name: file.read_bytes() for file in path.iterdir()} == CONTENT
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()} == {0o644}
    assert stat.S_IMODE(path.stat().st_mode) == 0o755
    assert staging_of(tmp_path) == []
    assert store.size_bytes() == 4


def test_publishing_twice_keeps_the_first_blob(store: Store, tmp_path: Path) -> None:
    _, path = publish(store)
    inode = path.stat().st_ino
    _, again = publish(store)
    assert (again, again.stat().st_ino) == (path, inode)
    assert staging_of(tmp_path) == []


def test_losing_the_race_to_publish_is_no_error(store: Store) -> None:
    barrier = threading.Barrier(4)
    paths: list[Path] = []

    def race() -> None:
        with store.staging() as staged:
            digest = fill(staged)
            barrier.wait()
            paths.append(store.publish(staged, digest))

    threads = [threading.Thread(target=race) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(paths) == 4
    assert len(set(paths)) == 1


def test_damaged_blob_is_reported_not_served_as_equal(store: Store) -> None:
    digest, _ = publish(store)
    damage(store, digest)
    assert store.hashes(digest)["two.bin"] == hashlib.sha256(b"\x00\x02").hexdigest()
    with pytest.raises(StoreError, match="damaged"):
        publish(store)


def test_staging_is_removed_when_the_block_fails(store: Store, tmp_path: Path) -> None:
    def fail() -> None:
        with store.staging() as staged:
            fill(staged)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert staging_of(tmp_path) == []


def test_deleted_blob_is_gone_and_deleting_again_is_no_error(store: Store, tmp_path: Path) -> None:
    digest, path = publish(store)
    store.delete(digest)
    assert not path.exists()
    assert staging_of(tmp_path) == []
    with pytest.raises(StoreError, match="missing"):
        store.path(digest)
    assert store.digests() == []
    assert store.hashes(digest) == {}
    assert store.at_hand(digest) is None
    store.delete(digest)


def test_what_is_published_is_there_for_whoever_opens_the_store_next(open_store: Callable[[], Store]) -> None:
    digest, path = publish(open_store())
    again = open_store()
    assert again.digests() == [digest]
    assert again.at_hand(digest) == again.path(digest) == path
    assert again.hashes(digest) == digest_files(path)[1]
    assert again.mend(digest, again.hashes(digest)) == []


def test_preparing_makes_nothing_visible_and_publishing_needs_none(store: Store) -> None:
    with store.staging() as staged:
        digest = fill(staged)
        store.prepare(staged, digest)
        assert store.digests() == []
        assert store.at_hand(digest) is None
        with pytest.raises(StoreError, match="missing"):
            store.path(digest)
        store.publish(staged, digest)
    assert store.digests() == [digest]


def test_deleting_what_was_only_prepared_takes_it(store: Store) -> None:
    with store.staging() as staged:
        digest = fill(staged)
        store.prepare(staged, digest)
        store.delete(digest)
        store.publish(staged, digest)
    assert store.size_bytes() == 4
    assert store.mend(digest, store.hashes(digest)) == []


@pytest.mark.parametrize("digest", ["", "sha256:", "sha256:../../etc", "md5:" + "0" * 64, "sha256:" + "A" * 64])
def test_only_digests_name_blobs(store: Store, digest: str) -> None:
    with pytest.raises(StoreError, match="not a digest"):
        store.path(digest)


def test_sweep_removes_leftovers_and_strangers_but_nothing_alive(store: Store, tmp_path: Path) -> None:
    kept, path = publish(store)
    stranger, _ = publish(store, {"x": b"x"})
    leftover = tmp_path / "store" / "staging" / "leftover"
    leftover.mkdir()
    (leftover / "half").write_bytes(b"half")
    with store.staging() as alive:
        assert sorted(store.leftovers({kept})) == sorted(["staging/leftover", stranger])
        assert leftover.is_dir()
        assert sorted(store.sweep({kept})) == sorted(["staging/leftover", stranger])
        assert alive.is_dir()
    assert path.is_dir()
    assert store.leftovers({kept}) == store.sweep({kept}) == []
    assert store.digests() == [kept]


def test_unwritable_store_says_so(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("a file where the directory should be")
    with pytest.raises(StoreError, match="check the disk"):
        LocalStore(tmp_path / "store")


def test_a_store_belongs_to_one_registry(open_store: Callable[[], Store]) -> None:
    open_store().claim("first")
    open_store().claim("first")
    with pytest.raises(StoreError, match="belongs to registry first") as refused:
        open_store().claim("second")
    assert refused.value.code == "other_registry"
