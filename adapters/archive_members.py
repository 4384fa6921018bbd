"""Tar and zip files as a stream of members with bounded memory, whatever their headers claim.

It refuses what is not a plain file or directory; it does not know which names are good.
"""

from __future__ import annotations

import io
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, BinaryIO, cast

from adapters.errors import UnsafeArchive, UploadError, UploadTooLarge
from adapters.gunzip import Gunzip
from adapters.upload import UploadLimits
from adapters.zip_layout import require_layout

CHUNK_BYTES = 1 << 14
"""Also the most that one tar header may hold: the standard library's pax parser is quadratic in it."""
HEADER_BYTES_A_FILE = 4096
"""Room for one member's headers: names, pax records, padding."""
END_BYTES = 1 << 20
"""Room for the padding behind the last member."""

# What the parsers of the standard library raise for damaged input, beside their own errors.
DAMAGED = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    OSError,
    ValueError,
    OverflowError,
    RecursionError,
    NotImplementedError,
    IndexError,
    KeyError,
)


@dataclass(frozen=True)
class Member:
    name: str
    is_file: bool
    chunks: Iterator[bytes]
    """To be read before the next member, or not at all."""


def read_tar(stream: BinaryIO, gzipped: bool, limits: UploadLimits) -> Iterator[Member]:
    with _reporting_damage():
        plain = cast(BinaryIO, Gunzip(stream)) if gzipped else stream
        # Skipped members are decompressed too, so the place in the stream is limited, not only what is kept.
        bounded = _BoundedStream(
            plain, CHUNK_BYTES, limits.max_bytes + limits.max_files * HEADER_BYTES_A_FILE + END_BYTES
        )
        with tarfile.open(fileobj=bounded, mode="r:") as archive:
            for entry in archive:
                if not entry.isdir() and (not entry.isreg() or entry.issparse()):
                    raise UnsafeArchive(f"{entry.name[:200]!r} is a link, device or sparse file; pack plain files only")
                yield Member(entry.name, entry.isreg(), _chunks(archive.extractfile(entry)))
        _require_end(bounded)


def _require_end(archive: _BoundedStream) -> None:
    """Where a header is missing or damaged tarfile stops as if the archive ended, and what follows would be lost."""
    if archive.last_read != bytes(tarfile.BLOCKSIZE):
        raise UploadError(
            f"the archive cannot be read: no end mark at byte {archive.tell()}, it is damaged; pack it again",
            code="bad_archive",
        )
    while rest := archive.read(CHUNK_BYTES):  # gzip's checksum stands at the very end
        if rest.strip(b"\0"):
            raise UnsafeArchive("something follows the archive's end mark; send one archive and nothing behind it")


def read_zip(stream: BinaryIO, limits: UploadLimits) -> Iterator[Member]:
    with _reporting_damage():
        # The central directory is read in one piece: its size is what bounds the number of members.
        directory_bytes = max(1 << 17, limits.max_files * HEADER_BYTES_A_FILE)
        with zipfile.ZipFile(cast(BinaryIO, _BoundedStream(stream, directory_bytes, None))) as archive:
            for entry in archive.infolist():
                _require_plain(entry)
            require_layout(stream, archive)
            for entry in archive.infolist():
                yield Member(entry.orig_filename, not entry.is_dir(), _zip_chunks(archive, entry))


def _require_plain(entry: zipfile.ZipInfo) -> None:
    kind = stat.S_IFMT(entry.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise UnsafeArchive(f"{entry.filename[:200]!r} is a link or device; pack plain files only")
    if entry.flag_bits & 0x1:
        raise UploadError(f"{entry.filename[:200]!r} is encrypted; pack without a password")
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise UploadError(
            f"{entry.filename[:200]!r} is compressed by method {entry.compress_type}; use deflate or store"
        )


def _zip_chunks(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Iterator[bytes]:
    left = entry.file_size
    with _reporting_damage(), archive.open(entry) as file:
        for chunk in _chunks(file):
            left -= len(chunk)
            yield chunk
    if left:
        raise UploadError(
            f"{entry.filename[:200]!r} has {entry.file_size - left} bytes, its header says {entry.file_size}; "
            "pack it again",
            code="bad_archive",
        )


def _chunks(file: IO[bytes] | None) -> Iterator[bytes]:
    with _reporting_damage():
        while file is not None and (chunk := file.read(CHUNK_BYTES)):
            yield chunk


@contextmanager
def _reporting_damage() -> Iterator[None]:
    try:
        yield
    except DAMAGED as error:
        raise UploadError(f"the archive cannot be read: {error}; pack it again", code="bad_archive") from error


class _BoundedStream(io.RawIOBase):
    """Parsers trust sizes in headers and read that much at once; here such a read fails instead of filling memory."""

    def __init__(self, stream: BinaryIO, max_read_bytes: int, max_position: int | None) -> None:
        self._stream = stream
        self._max_read_bytes = max_read_bytes
        self._max_position = max_position
        self.last_read = b""

    def read(self, size: int = -1) -> bytes:
        if size > self._max_read_bytes:
            raise self._too_much(size)
        if size >= 0:
            self._require_within(self.tell() + size)
            self.last_read = self._stream.read(size)
            return self.last_read
        rest = self._stream.read(self._max_read_bytes + 1)
        if len(rest) > self._max_read_bytes:
            raise self._too_much(len(rest))
        return rest

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_SET:
            self._require_within(offset)
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        return self._stream.tell()

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def _too_much(self, size: int) -> UnsafeArchive:
        return UnsafeArchive(f"a header claims {size} bytes, at most {self._max_read_bytes} are read; pack it again")

    def _require_within(self, position: int) -> None:
        if self._max_position is not None and position > self._max_position:
            raise UploadTooLarge(f"unpacks to more than {self._max_position} bytes; send only the adapter's own files")
