"""A gzip file's content as a stream that goes forward only, with bounded memory.

The standard library's reader takes names in headers byte by byte and any number of empty members, minutes for a file
of legal size; zlib itself does not. It knows nothing of what is packed.
"""

from __future__ import annotations

import io
import zlib
from typing import BinaryIO

CHUNK_BYTES = 1 << 16
GZIP = 16 + zlib.MAX_WBITS
MAX_MEMBERS = 1 << 16
"""Packers that work in parallel write one for every 64 KiB or more."""


class Gunzip(io.RawIOBase):
    """Raises zlib.error for damage, EOFError for an end in the middle."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._inflater = zlib.decompressobj(GZIP)
        self._waiting = b""
        """Read, not inflated yet."""
        self._place = 0
        self._members = 1
        self._over = False

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        """`size` bytes, fewer at the end only."""
        assert size >= 0, "the caller bounds what it reads"
        parts, left = [], size
        while left and (part := self._some(left)):
            parts.append(part)
            left -= len(part)
        self._place += size - left
        return b"".join(parts)

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Forward, by reading."""
        if whence != io.SEEK_SET or offset < self._place:
            raise io.UnsupportedOperation(f"seeks backwards, from {self._place} to {offset}")
        while self._place < offset and self.read(min(CHUNK_BYTES, offset - self._place)):
            pass
        return self._place

    def _some(self, most: int) -> bytes:
        """One to `most` bytes; none at the end."""
        while not self._over:
            if self._inflater.eof:
                self._next_member()
                continue
            self._waiting = self._waiting or self._stream.read(CHUNK_BYTES)
            if not self._waiting:
                raise EOFError("it ends in the middle of its compressed data")
            part = self._inflater.decompress(self._waiting, most)
            self._waiting = self._inflater.unconsumed_tail or self._inflater.unused_data
            if part:
                return part
        return b""

    def _next_member(self) -> None:
        """Zeros behind the last one are padding."""
        waiting = self._waiting.lstrip(b"\0")
        while not waiting:
            chunk = self._stream.read(CHUNK_BYTES)
            if not chunk:
                self._over = True
                return
            waiting = chunk.lstrip(b"\0")
        self._waiting = waiting
        self._members += 1
        if self._members > MAX_MEMBERS:
            raise zlib.error(f"it has more than {MAX_MEMBERS} gzip members")
        self._inflater = zlib.decompressobj(GZIP)
