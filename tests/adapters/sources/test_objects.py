"""`s3://` through fsspec, against a real S3 server on loopback; and protocols without a driver."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest

from adapters.errors import (
    AdapterError,
    SourceError,
    SourceForbidden,
    SourceNotFound,
    SourceUnavailable,
    UploadTooLarge,
)
from adapters.sources.address import Policy, parse
from adapters.sources.fetch import Progress, fetch
from adapters.upload import UploadLimits
from tests.adapters.factories import AdapterFiles, tar

FILES = AdapterFiles().files()
ARCHIVE = tar(FILES)


@pytest.fixture
def bucket(s3: Callable[[], str]) -> str:
    return s3()


def put(url: str, content: bytes) -> None:
    with fsspec.open(url, "wb") as file:
        file.write(content)


def fill(bucket: str) -> None:
    for name, content in {**FILES, "optimizer.pt": b"x", "notes.txt": b"x"}.items():
        put(f"{bucket}/run/{name}", content)
    put(f"{bucket}/adapter.tar.gz", ARCHIVE)


def read(address: str, into: Path, limits: UploadLimits | None = None) -> tuple[dict[str, bytes], list[Progress]]:
    seen: list[Progress] = []
    policy = Policy((parse(address).protocol,))
    fetched = fetch(parse(address), policy, into, limits or UploadLimits(max_bytes=1 << 24), seen.append)
    assert fetched.lineage == {"url": address}
    return {path.name: path.read_bytes() for path in fetched.files}, seen


@pytest.mark.parametrize("slash", ["", "/"])
def test_a_prefix_gives_its_kept_files(bucket: str, tmp_path: Path, slash: str) -> None:
    fill(bucket)
    found, seen = read(f"{bucket}/run{slash}", tmp_path)
    assert found == FILES
    total = sum(map(len, FILES.values()))
    assert (seen[-1].bytes, seen[-1].total_bytes) == (total, total)


def test_a_whole_bucket_is_a_place_too(bucket: str, tmp_path: Path) -> None:
    for name, content in FILES.items():
        put(f"{bucket}/{name}", content)
    assert read(bucket, tmp_path)[0] == FILES


def test_an_archive_is_an_object(bucket: str, tmp_path: Path) -> None:
    fill(bucket)
    assert read(f"{bucket}/adapter.tar.gz", tmp_path)[0] == {"adapter.tar.gz": ARCHIVE}


def test_a_large_object_comes_in_blocks_and_progress_follows(bucket: str, tmp_path: Path) -> None:
    content = bytes(range(256)) * (9 << 12)
    put(f"{bucket}/large.zip", content)
    found, seen = read(f"{bucket}/large.zip", tmp_path)
    assert found == {"large.zip": content}
    assert [progress.bytes for progress in seen] == sorted(progress.bytes for progress in seen)
    assert len(seen) > 10


@pytest.mark.parametrize("path", ["run", "adapter.tar.gz"])
def test_what_is_too_large_is_not_read(bucket: str, tmp_path: Path, path: str) -> None:
    fill(bucket)
    with pytest.raises(UploadTooLarge, match="the limit is 100"):
        read(f"{bucket}/{path}", tmp_path, UploadLimits(max_bytes=100))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("path", "error", "said"),
    [
        ("/none", SourceNotFound, "nothing at"),
        ("-none/run", SourceNotFound, "nothing at"),
        ("/run/notes.txt", SourceError, "no archive"),
        ("/other", AdapterError, "holds none of an adapter's files"),
    ],
)
def test_what_cannot_be_read_says_why(
    bucket: str, tmp_path: Path, path: str, error: type[AdapterError], said: str
) -> None:
    fill(bucket)
    put(f"{bucket}/other/notes.txt", b"x")
    with pytest.raises(error, match=said):
        read(bucket + path, tmp_path)


def test_without_credentials_it_says_so(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    monkeypatch.setattr("adapters.sources.objects.OPTIONS", {"s3": {"skip_instance_cache": True}})
    with pytest.raises(SourceForbidden, match="credentials"):
        read(f"{bucket}/run", tmp_path)


def test_a_driver_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    with pytest.raises(SourceError, match=r"pip install 'loraplex\[s3\]'") as error:
        read("s3://bucket/run", tmp_path)
    assert error.value.code == "missing_driver"


def test_a_protocol_that_nobody_knows(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="nobody here knows"):
        read("gopher://host/run", tmp_path)


def test_a_store_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bucket: str) -> None:
    options = {"skip_instance_cache": True, "endpoint_url": "http://127.0.0.1:9"}
    options |= {"config_kwargs": {"retries": {"max_attempts": 0}}}
    monkeypatch.setattr("adapters.sources.objects.OPTIONS", {"s3": options})
    monkeypatch.setattr("s3fs.core.S3FileSystem.retries", 1)
    with pytest.raises(SourceUnavailable):
        read(f"{bucket}/run", tmp_path)
