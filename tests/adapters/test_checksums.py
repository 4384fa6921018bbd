"""A SHA-256 given with an upload: what differs is refused, and leaves no trace."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from adapters.errors import ChecksumMismatch, UploadError
from adapters.upload import UploadedFile, UploadOptions
from tests.adapters.conftest import Shop
from tests.adapters.factories import AdapterFiles, loose, tar, uploaded

FILES = AdapterFiles().files()
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PACKED = tar({f"run/{name}": content for name, content in FILES.items()})


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def of_files() -> list[UploadedFile]:
    return loose(FILES)


def of_archive() -> list[UploadedFile]:
    return uploaded("a.tar.gz", PACKED)


RIGHT: list[tuple[Callable[[], list[UploadedFile]], str | Mapping[str, str]]] = [
    (of_files, digest(FILES[WEIGHTS])),
    (of_files, digest(FILES[WEIGHTS]).upper()),
    (of_files, {name: digest(content) for name, content in FILES.items()}),
    (of_files, {CONFIG: digest(FILES[CONFIG])}),
    (of_files, {}),
    (of_archive, digest(PACKED)),
    (of_archive, {"a.tar.gz": digest(PACKED)}),
    (of_archive, {"a.tar.gz": digest(PACKED), f"run/{WEIGHTS}": digest(FILES[WEIGHTS])}),
    (of_archive, {WEIGHTS: digest(FILES[WEIGHTS])}),
]


@pytest.mark.parametrize(("files", "sha256"), RIGHT)
def test_what_is_as_it_should_be_is_taken_whole(
    shop: Shop, files: Callable[[], list[UploadedFile]], sha256: Any
) -> None:
    version, _ = shop.ingest.upload("a", files(), UploadOptions(sha256=sha256))
    assert version.manifest.files[WEIGHTS] == digest(FILES[WEIGHTS])


WRONG: list[tuple[Callable[[], list[UploadedFile]], str | Mapping[str, str], str]] = [
    (of_files, digest(FILES[CONFIG]), WEIGHTS),
    (of_files, {CONFIG: digest(FILES[WEIGHTS])}, CONFIG),
    (of_files, {"config.json": digest(FILES[CONFIG])}, "was not sent"),
    (of_archive, digest(FILES[WEIGHTS]), "a.tar.gz"),
    (of_archive, {WEIGHTS: digest(PACKED)}, WEIGHTS),
    (of_archive, {"../registry.db": digest(PACKED)}, "was not sent"),
]


@pytest.mark.parametrize(("files", "sha256", "named"), WRONG)
def test_what_differs_is_refused_and_leaves_nothing(
    shop: Shop, files: Callable[[], list[UploadedFile]], sha256: Any, named: str
) -> None:
    before = shop.contents()
    with pytest.raises(ChecksumMismatch, match=named) as refused:
        shop.ingest.upload("a", files(), UploadOptions(sha256=sha256))
    assert refused.value.code == "sha256_mismatch"
    assert shop.contents() == before
    assert shop.registry.adapters() == []


@pytest.mark.parametrize("sha256", ["", "abc", "g" * 64, "0" * 63, {CONFIG: "0" * 65}, {CONFIG: f"sha256:{'0' * 64}"}])
def test_what_is_no_sha256_is_an_error_of_its_own(shop: Shop, sha256: Any) -> None:
    with pytest.raises(UploadError, match="expected 64 hex digits") as refused:
        shop.ingest.upload("a", of_files(), UploadOptions(sha256=sha256))
    assert refused.value.code == "bad_sha256"
