"""What comes out of a gzip file is what went in, whatever its members; damage is told."""

from __future__ import annotations

import gzip
import io
import random
import zlib
from itertools import pairwise

import pytest

from adapters.gunzip import CHUNK_BYTES, Gunzip

CONTENT = random.Random(0).randbytes(3 * CHUNK_BYTES) + bytes(3 * CHUNK_BYTES)


def inflated(packed: bytes, size: int = 10_000) -> bytes:
    stream = Gunzip(io.BytesIO(packed))
    return b"".join(iter(lambda: stream.read(size), b""))


@pytest.mark.parametrize("size", [1000, CHUNK_BYTES, 10 * CHUNK_BYTES])
@pytest.mark.parametrize("cuts", [[], [0], [1], [CHUNK_BYTES], [0, 7, 7, 5 * CHUNK_BYTES]])
def test_members_are_one_content(size: int, cuts: list[int]) -> None:
    ends = [0, *cuts, len(CONTENT)]
    packed = b"".join(gzip.compress(CONTENT[start:end]) for start, end in pairwise(ends))
    assert inflated(packed, size) == CONTENT
    assert inflated(packed + bytes(100), size) == CONTENT


def test_a_read_is_whole_until_the_end() -> None:
    stream = Gunzip(io.BytesIO(gzip.compress(b"abc") + gzip.compress(b"defgh")))
    assert [stream.read(5), stream.tell(), stream.read(5), stream.read(5), stream.tell()] == [
        b"abcde", 5, b"fgh", b"", 8,
    ]  # fmt: skip


def test_it_seeks_forward_only() -> None:
    stream = Gunzip(io.BytesIO(gzip.compress(CONTENT)))
    assert stream.seek(CHUNK_BYTES + 5) == CHUNK_BYTES + 5
    assert stream.read(9) == CONTENT[CHUNK_BYTES + 5 : CHUNK_BYTES + 14]
    assert stream.seek(len(CONTENT) + 100) == len(CONTENT)
    with pytest.raises(io.UnsupportedOperation, match="backwards"):
        stream.seek(0)


@pytest.mark.parametrize("cut", range(0, 60, 3))
def test_a_file_that_is_cut_off_is_told(cut: int) -> None:
    with pytest.raises((EOFError, zlib.error)):
        inflated(gzip.compress(b"some words that do not compress", 9)[: cut % 50])


@pytest.mark.parametrize("behind", [b"x", b"garbage", b"\0\0x", b"\x1f\x8b"])
def test_what_follows_is_told(behind: bytes) -> None:
    with pytest.raises((EOFError, zlib.error)):
        inflated(gzip.compress(b"words") + behind)


def test_empty_members_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapters.gunzip.MAX_MEMBERS", 10)
    assert inflated(gzip.compress(b"") * 10) == b""
    with pytest.raises(zlib.error, match="more than 10"):
        inflated(gzip.compress(b"") * 11)
