from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from adapters.errors import Conflict, StoreError, UnsafeArchive, UploadError
from adapters.pull import pull
from adapters.store import digest_of

FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights" * 100}


class Shelf:
    """One version, `a@3`, whose files a test may spoil."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.sent = dict(files)
        self.sums = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
        self.digest = digest_of(self.sums)

    def version(self, name: str, ref: str) -> dict[str, Any]:
        assert (name, ref) == ("a", "blue")
        return {"name": "a", "version": 3, "digest": self.digest}

    def files(self, name: str, ref: str) -> list[dict[str, Any]]:
        assert (name, ref) == ("a", "3"), "the alias may have moved"
        return [{"name": file, "size_bytes": 1, "sha256": value} for file, value in self.sums.items()]

    @contextmanager
    def read(self, name: str, ref: str, file: str) -> Iterator[Iterator[bytes]]:
        assert (name, ref) == ("a", "3")
        yield iter([self.sent[file][:3], self.sent[file][3:]])


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_the_files_come_whole_and_a_second_time_nothing_happens(tmp_path: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    version, written = pull(Shelf(FILES), "a", "blue", tmp_path / "x" / "y", lambda *step: steps.append(step))
    assert (version["version"], written) == (3, True)
    assert contents(tmp_path / "x" / "y") == FILES
    assert sum(step[2] for step in steps) == sum(map(len, FILES.values()))
    assert pull(Shelf(FILES), "a", "blue", tmp_path / "x" / "y")[1] is False
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["y"]


def test_an_empty_directory_is_filled(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    assert pull(Shelf(FILES), "a", "blue", tmp_path / "there")[1]
    assert contents(tmp_path / "there") == FILES


@pytest.mark.parametrize(
    "there",
    [{"other": b""}, {**FILES, "more": b""}, {**FILES, "adapter_config.json": b"[]"}, dict([*FILES.items()][:1])],
)
def test_a_directory_with_anything_else_is_left_alone(tmp_path: Path, there: dict[str, bytes]) -> None:
    for name, content in there.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(Conflict, match="holds something else") as refused:
        pull(Shelf(FILES), "a", "blue", tmp_path)
    assert refused.value.code == "not_empty"
    assert contents(tmp_path) == there


def test_a_file_in_its_place_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("file", "dangling"):
        with pytest.raises(Conflict, match="no directory"):
            pull(Shelf(FILES), "a", "blue", tmp_path / name)
    assert (tmp_path / "file").read_text() == "mine"


def test_damage_on_the_way_leaves_nothing(tmp_path: Path) -> None:
    shelf = Shelf(FILES)
    shelf.sent["adapter_model.safetensors"] = b"w" * 700
    with pytest.raises(StoreError, match=r"adapter_model\.safetensors came with SHA-256"):
        pull(shelf, "a", "blue", tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_files_of_another_version_are_noticed(tmp_path: Path) -> None:
    shelf = Shelf(FILES)
    shelf.digest = "sha256:" + "0" * 64
    with pytest.raises(StoreError, match="are not those of sha256:000"):
        pull(shelf, "a", "blue", tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "error"), [("../x", UnsafeArchive), ("/x", UnsafeArchive), ("a/b", UploadError)])
def test_a_server_cannot_write_elsewhere(tmp_path: Path, name: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        pull(Shelf({name: b""}), "a", "blue", tmp_path / "x")
    assert list(tmp_path.iterdir()) == []
