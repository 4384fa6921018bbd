from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from adapters import tarball


@pytest.mark.parametrize("sizes", [[], [0], [1], [512], [513], [tarball.PIECE_BYTES + 1, 0, 3]])
def test_it_is_a_tar_of_the_size_that_was_foretold_and_always_the_same(tmp_path: Path, sizes: list[int]) -> None:
    contents = {f"file-{number}.json": bytes([number + 1]) * size for number, size in enumerate(sizes)}
    for name, content in reversed(contents.items()):
        (tmp_path / name).write_bytes(content)
    paths = list(tmp_path.iterdir())
    made = b"".join(tarball.pieces(paths))
    assert len(made) == tarball.size_bytes(paths)
    with tarfile.open(fileobj=io.BytesIO(made)) as archive:
        members = archive.getmembers()
        found = {member.name: archive.extractfile(member).read() for member in members}  # type: ignore[union-attr]
    assert list(found.items()) == list(contents.items())
    assert {(member.mtime, member.uid, member.gid, member.mode) for member in members} <= {(0, 0, 0, 0o644)}

    for path in paths:
        path.chmod(0o600)
        path.touch()
    assert b"".join(tarball.pieces(reversed(paths))) == made


def test_files_that_are_deleted_meanwhile_are_still_in_it(tmp_path: Path) -> None:
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        path.write_bytes(b"x" * 10)
    expected = b"".join(tarball.pieces(paths))
    made = tarball.pieces(paths)
    first = next(made)
    for path in paths:
        path.unlink()
    assert first + b"".join(made) == expected


def test_large_files_fit_the_format() -> None:
    assert len(tarball._header("adapter_model.safetensors", 9 << 30)) == tarfile.BLOCKSIZE
