from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from adapters.errors import NotFound
from adapters.export_store import Export, ExportFile, ExportStore, id_of

EXPORT = Export(
    id=id_of("sha256:a", "sha256:b", "hf", {"outtype": "bf16"}),
    adapter="sea@1",
    digest="sha256:a",
    base={"name": "tiny", "fingerprint": "sha256:b"},
    format="hf",
    options={"outtype": "bf16"},
    estimated_bytes=100,
    job="job-1",
    created_at=1000,
    created_by="me",
)


@pytest.fixture
def store(tmp_path: Path) -> ExportStore:
    return ExportStore(tmp_path / "exports")


def made(store: ExportStore, tmp_path: Path, expires_at: int | None = None) -> Export:
    store.keep(EXPORT)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/a.bin").write_bytes(b"abc")
    store.take_in(EXPORT, tmp_path / "out")
    return store.ready(replace(EXPORT, files=(ExportFile("a.bin", 3, "00"),)), 2000, expires_at)


def names(store: ExportStore) -> list[str]:
    return sorted(path.name for path in store.path(EXPORT.id).parent.iterdir())


def test_the_same_wish_has_the_same_id_whatever_the_order_of_its_options() -> None:
    wish = ("sha256:a", "sha256:b", "hf")
    assert id_of(*wish, {"a": 1, "b": 2}) == id_of(*wish, {"b": 2, "a": 1})
    assert len({EXPORT.id, id_of("sha256:a", "sha256:b", "gguf", {"outtype": "bf16"}), id_of(*wish, {})}) == 3


def test_what_is_kept_is_read_again_and_takes_its_estimate_until_it_is_ready(
    store: ExportStore, tmp_path: Path
) -> None:
    ready = made(store, tmp_path)
    assert store.exports() == [store.export(EXPORT.id)] == [ready]
    assert (EXPORT.size_bytes, ready.size_bytes) == (100, 3)
    assert (store.path(EXPORT.id) / "a.bin").read_bytes() == b"abc"
    with pytest.raises(NotFound, match=r"it has a\.bin"):
        ready.file("../a.bin")


def test_files_that_are_in_place_already_stay(store: ExportStore, tmp_path: Path) -> None:
    """A crash came between them and the record."""
    made(store, tmp_path)
    store.take_in(EXPORT, tmp_path / "out")
    assert (store.path(EXPORT.id) / "a.bin").read_bytes() == b"abc"


def test_what_expired_and_what_crashes_left_goes(store: ExportStore, tmp_path: Path) -> None:
    made(store, tmp_path, expires_at=3000)
    store.path("exp-of-nobody").mkdir()
    (store.path(EXPORT.id).parent / ".half-written").touch()
    assert store.sweep(2999) == ["exp-of-nobody"]
    assert names(store) == [EXPORT.id, f"{EXPORT.id}.json"]
    assert store.sweep(3000) == [EXPORT.id]
    assert names(store) == []


@pytest.mark.parametrize("export_id", ["exp-none", "../exp-1", f"{EXPORT.id}\n", ""])
def test_an_id_that_is_none_is_not_found(store: ExportStore, export_id: str) -> None:
    with pytest.raises(NotFound):
        store.export(export_id)
