"""The one door: what comes in is whole and registered, what is refused leaves no trace."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapters.errors import AdapterError, Conflict, InvalidAdapter, NotFound, StoreError, UploadError, UploadTooLarge
from adapters.ingest import Ingest
from adapters.refusals import REFUSALS
from adapters.registry import Registry
from adapters.upload import UploadedFile, UploadLimits, UploadOptions
from tests.adapters.conftest import Shop
from tests.adapters.factories import AdapterFiles, loose, lora_config, lora_tensors, tar, tensor, uploaded

OTHER = AdapterFiles(tensors=lora_tensors(seed=1))


def blobs(shop: Shop) -> set[str]:
    return {f"sha256:{path.name}" for path in (shop.root / "blobs").iterdir()}


def test_upload_is_stored_and_registered(shop: Shop) -> None:
    version, created = shop.ingest.upload("a", AdapterFiles().uploads(), UploadOptions(description="hello"))
    assert created
    assert shop.registry.resolve("a") == version
    stored = {path.name: path.read_bytes() for path in shop.store.path(version.digest).iterdir()}
    assert stored == AdapterFiles().files()
    assert list((shop.root / "staging").iterdir()) == []


def test_archive_and_loose_files_of_the_same_bytes_are_the_same_version(shop: Shop) -> None:
    first, _ = shop.ingest.upload("a", AdapterFiles().uploads())
    packed = uploaded("a.tgz", tar({f"a/{name}": content for name, content in AdapterFiles().files().items()}))
    assert shop.ingest.upload("a", packed) == (first, False)
    assert blobs(shop) == {first.digest}


def test_local_directory_comes_in_through_the_same_door(shop: Shop, tmp_path: Path) -> None:
    path = AdapterFiles(extra={"training_args.bin": b"x", "loss.png": b"x"}).write(tmp_path / "trained")
    (path / "checkpoint-10").mkdir()
    version, _ = shop.ingest.directory("a", path, UploadOptions(promote=False))
    assert set(version.manifest.files) == {"adapter_config.json", "adapter_model.safetensors"}
    with pytest.raises(UploadError, match="not a directory"):
        shop.ingest.directory("a", tmp_path / "gone")


class Unreadable:
    def read(self, size: int = -1) -> bytes:
        raise AssertionError("read before the name was checked")


@pytest.mark.parametrize("name", ["", "a/b", "tiny"])
def test_names_are_checked_before_anything_is_read(shop: Shop, name: str) -> None:
    with pytest.raises(InvalidAdapter) as error:
        shop.ingest.upload(name, [UploadedFile("README.md", Unreadable())])  # type: ignore[arg-type]
    assert error.value.code == "bad_name"


def without(name: str) -> dict[str, bytes]:
    return {key: content for key, content in AdapterFiles().files().items() if key != name}


NAN = tensor([[float("nan")] * 8] * 4)
QUERY_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
GOOD = AdapterFiles().files()
BAD: dict[str, tuple[dict[str, bytes], str]] = {
    "pickle": ({**without("adapter_model.safetensors"), "adapter_model.bin": b"\x80"}, "pickle"),
    "truncated": ({**GOOD, "adapter_model.safetensors": GOOD["adapter_model.safetensors"][:-9]}, "bad_safetensors"),
    "wrong base": ({**GOOD, "loraplex.json": b'{"base_fingerprint": "sha256:00"}'}, "wrong_base"),
    "other rank": ({**GOOD, "adapter_config.json": json.dumps(lora_config(r=17)).encode()}, "rank_mismatch"),
    "no modules": (AdapterFiles(tensors={}).files(), "no_modules"),
    "NaN": (AdapterFiles(tensors=lora_tensors() | {QUERY_A: NAN}).files(), "non_finite"),
    "traversal": ({**GOOD, "../README.md": b""}, "unsafe_archive"),
    "no weights": (without("adapter_model.safetensors"), "missing_file"),
    "no configuration": (without("adapter_config.json"), "missing_file"),
    "too large": ({**GOOD, "README.md": bytes(1 << 20)}, "upload_too_large"),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("files", "code"), BAD.values(), ids=BAD)
def test_bad_upload_leaves_the_store_unchanged(shop: Shop, files: dict[str, bytes], code: str, packed: bool) -> None:
    shop.ingest.upload("good", OTHER.uploads())
    before, adapters = shop.contents(), shop.registry.adapters()
    with pytest.raises(AdapterError) as error:
        shop.ingest.upload("bad", uploaded("a.tar.gz", tar(files)) if packed else loose(files))
    assert error.value.code == code
    assert code in REFUSALS or isinstance(error.value, UploadError)
    assert shop.contents() == before
    assert shop.registry.adapters() == adapters
    assert list((shop.root / "staging").iterdir()) == []


def test_failing_registry_takes_the_files_back(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    before = shop.contents()

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("database gone")

    monkeypatch.setattr(shop.registry, "add_version", fail)
    with pytest.raises(RuntimeError, match="database gone"):
        shop.ingest.upload("a", AdapterFiles().uploads())
    assert shop.contents() == before
    assert blobs(shop) == set()


def test_failing_registry_keeps_files_that_others_use(shop: Shop) -> None:
    version, _ = shop.ingest.upload("a", AdapterFiles().uploads())
    with pytest.raises(InvalidAdapter):
        shop.ingest.upload("b", AdapterFiles().uploads(), UploadOptions(description="x" * 5000))
    assert blobs(shop) == {version.digest}


def test_full_disk_is_reported_and_leaves_nothing(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(AdapterError, match="No space left on device; check the disk") as error:
        shop.ingest.upload("a", AdapterFiles().uploads())
    assert error.value.code == "store_error"
    assert shop.contents().keys() == {"lock", "registry"}


def test_forgetting_deletes_the_files_when_the_last_reference_goes(shop: Shop) -> None:
    shop.ingest.upload("a", AdapterFiles().uploads())
    shop.ingest.upload("b", AdapterFiles().uploads())
    version, _ = shop.ingest.upload("b", OTHER.uploads())
    shop.ingest.forget("b", 1)
    assert len(blobs(shop)) == 2
    with pytest.raises(Conflict):
        shop.ingest.forget("b", 2)
    shop.ingest.forget("a", 1, with_aliases=True)
    assert blobs(shop) == {version.digest} == shop.registry.digests()
    with pytest.raises(NotFound):
        shop.ingest.forget("b", 9)
    shop.ingest.forget("b", 2, with_aliases=True)
    assert blobs(shop) == set()


def test_sweep_removes_what_nobody_registered(shop: Shop) -> None:
    version, _ = shop.ingest.upload("a", AdapterFiles().uploads())
    shop.registry.remove_version("a", 1, with_aliases=True)
    assert shop.ingest.sweep() == [version.digest]
    assert blobs(shop) == set()


def test_uploads_and_deletions_of_the_same_bytes_at_once(shop: Shop) -> None:
    errors: list[BaseException] = []

    def churn(name: str) -> None:
        try:
            for _ in range(8):
                version, _ = shop.ingest.upload(name, AdapterFiles().uploads())
                assert shop.store.path(version.digest).is_dir()
                shop.ingest.forget(name, version.number, with_aliases=True)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=churn, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert blobs(shop) == set() == shop.registry.digests()
    assert list((shop.root / "staging").iterdir()) == []


def test_same_bytes_uploaded_at_once_are_one_version(shop: Shop) -> None:
    results: list[tuple[int, bool]] = []

    def upload() -> None:
        version, created = shop.ingest.upload("a", AdapterFiles().uploads())
        results.append((version.number, created))

    threads = [threading.Thread(target=upload) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [(1, False)] * 5 + [(1, True)]


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(sorted(GOOD)),
    changes=st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), min_size=1, max_size=5),
)
def test_any_damage_is_served_whole_or_refused_without_a_trace(
    shop: Shop, name: str, changes: list[tuple[int, int]]
) -> None:
    content = bytearray(GOOD[name])
    for position, value in changes:
        content[position % min(len(content), 1500)] = value
    before = shop.contents()
    try:
        version, _ = shop.ingest.upload("a", loose({**GOOD, name: bytes(content)}))
    except (InvalidAdapter, UploadTooLarge):
        assert shop.contents() == before
    else:
        assert (shop.store.path(version.digest) / name).read_bytes() == content
        shop.ingest.forget("a", version.number, with_aliases=True)
    assert shop.contents() == before


def test_the_door_needs_no_torch() -> None:
    code = "import sys, adapters.ingest; sys.exit(bool({'torch', 'transformers', 'fastapi'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0


def test_another_registry_cannot_sweep_the_store_empty(shop: Shop, tmp_path: Path) -> None:
    version, _ = shop.ingest.upload("a", AdapterFiles().uploads())
    stranger = Registry(f"sqlite:///{tmp_path / 'other.db'}")
    with pytest.raises(StoreError, match="belongs to registry"):
        Ingest(shop.store, stranger, shop.base, UploadLimits(), max_rank=16)
    stranger.close()
    assert blobs(shop) == {version.digest}
