"""A version's files as one tar, piece by piece: the same bytes whenever and wherever it is made.

They lie at its root, where an upload takes them from.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Generator, Iterable
from contextlib import ExitStack
from pathlib import Path

PIECE_BYTES = 1 << 20
END = bytes(2 * tarfile.BLOCKSIZE)


def size_bytes(files: Iterable[Path]) -> int:
    return sum(tarfile.BLOCKSIZE + _padded(path.stat().st_size) for path in files) + len(END)


def pieces(files: Iterable[Path]) -> Generator[bytes]:
    """All files are open before the first piece: a deletion in the meantime takes nothing from it."""
    with ExitStack() as stack:
        opened = [(path, stack.enter_context(path.open("rb"))) for path in sorted(files)]
        for path, stream in opened:
            size = os.fstat(stream.fileno()).st_size
            yield _header(path.name, size)
            while piece := stream.read(PIECE_BYTES):
                yield piece
            yield bytes(_padded(size) - size)
        yield END


def _header(name: str, size: int) -> bytes:
    member = tarfile.TarInfo(name)  # owner, group and times are zero
    member.size = size
    return member.tobuf(tarfile.GNU_FORMAT)


def _padded(size: int) -> int:
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
