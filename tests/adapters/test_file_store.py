"""Data files: by content, whole or not at all."""

from __future__ import annotations

import fcntl
import io
from pathlib import Path

import pytest

from adapters.errors import NotFound, UploadError, UploadTooLarge
from adapters.file_store import FileStore


@pytest.fixture
def files(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path)


def put(files: FileStore, content: bytes, purpose: str = "fine-tune", name: str = "a.jsonl") -> str:
    return files.create(io.BytesIO(content), name, purpose, by="me").id


def below(root: Path, folder: str) -> int:
    return len(list((root / folder).iterdir()))


def test_a_file_comes_back_as_it_was_sent(files: FileStore, tmp_path: Path) -> None:
    made = files.create(io.BytesIO(b"one\n"), "a.jsonl", "fine-tune", by="me")
    again = FileStore(tmp_path).file(made.id)
    assert again == made
    assert (again.filename, again.purpose, again.bytes, again.created_by) == ("a.jsonl", "fine-tune", 4, "me")
    assert files.path(made.id).read_bytes() == b"one\n"


def test_the_same_bytes_lie_there_once_and_as_long_as_a_file_has_them(files: FileStore, tmp_path: Path) -> None:
    first, second = put(files, b"same"), put(files, b"same", name="b.jsonl")
    assert below(tmp_path, "blobs") == 1
    files.delete(first)
    assert files.path(second).read_bytes() == b"same"
    files.delete(second)
    assert below(tmp_path, "blobs") == below(tmp_path, "records") == below(tmp_path, "staging") == 0
    with pytest.raises(NotFound):
        files.file(second)


def test_lists_come_in_pages_of_one_purpose_and_in_both_orders(files: FileStore) -> None:
    made = sorted(put(files, bytes([number])) for number in range(1, 4))
    other = put(files, b"x", purpose="fine-tune-results")
    assert [file.id for file in files.files(limit=2, purpose="fine-tune", oldest_first=True)] == made[:2]
    assert [file.id for file in files.files(limit=9, after=made[1], purpose="fine-tune")] == made[:1]
    assert {file.id for file in files.files(limit=9)} == {*made, other}


@pytest.mark.parametrize("file_id", ["", "file-0", "file-" + "0" * 23, "../lock", "file-\x00", "file-" + "g" * 23])
def test_an_unknown_id_is_not_found_and_never_a_path(files: FileStore, file_id: str) -> None:
    for call in (files.file, files.path, files.delete):
        with pytest.raises(NotFound):
            call(file_id)


@pytest.mark.parametrize(
    ("content", "name", "error"),
    [(b"", "a", UploadError), (b"12345", "a", UploadTooLarge), (b"1", "", UploadError), (b"1", "a\n", UploadError)],
)
def test_a_refused_file_leaves_nothing(
    files: FileStore, tmp_path: Path, content: bytes, name: str, error: type[Exception]
) -> None:
    with pytest.raises(error):
        files.create(io.BytesIO(content), name, "fine-tune", max_bytes=4)
    assert below(tmp_path, "blobs") == below(tmp_path, "records") == below(tmp_path, "staging") == 0


def test_a_sweep_takes_what_crashes_left_and_nothing_else(files: FileStore, tmp_path: Path) -> None:
    kept = put(files, b"kept")
    (tmp_path / "staging" / "dead").write_bytes(b"half")
    (tmp_path / "staging" / "alive").write_bytes(b"half")
    (tmp_path / "blobs" / ("0" * 64)).write_bytes(b"without a record")
    with (tmp_path / "staging" / "alive").open("rb") as alive:
        fcntl.flock(alive, fcntl.LOCK_EX)
        files.sweep()
    assert [path.name for path in (tmp_path / "staging").iterdir()] == ["alive"]
    assert [path.name for path in (tmp_path / "blobs").iterdir()] == [files.file(kept).sha256]
