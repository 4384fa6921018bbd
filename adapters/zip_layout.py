"""Proves that a zip file is exactly its members and their directory: no gap, no overlap, nothing before or behind, and
both headers of a member say the same. What one program finds in it, every other one finds as well.

It reads headers only and does not know which names are good.
"""

from __future__ import annotations

import io
import struct
import zipfile
from typing import BinaryIO

from adapters.errors import UnsafeArchive

LOCAL_HEADER = struct.Struct("<4s2x2H4x3L2H")
"""Signature, flags, method, checksum, packed and unpacked size, lengths of name and extra field."""
END_RECORD = struct.Struct("<4s4H2LH")
"""Signature, this disk, the directory's disk, members on this disk, members, directory's size and place, comment."""
SIZES_FOLLOW = 0x8
TELLING_FLAGS = 0x1 | SIZES_FOLLOW | 0x40 | 0x800
"""Encrypted, sizes behind the content, strongly encrypted, names in UTF-8."""
DESCRIPTOR_BYTES = (0, 12, 16, 20, 24)
IN_EXTRA_FIELD = 0xFFFFFFFF


def require_layout(stream: BinaryIO, archive: zipfile.ZipFile) -> None:
    """Raises UnsafeArchive."""
    entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
    place = 0
    for number, entry in enumerate(entries):
        if entry.header_offset != place:
            raise _unsafe(f"{entry.filename[:200]!r} begins at byte {entry.header_offset}, expected {place}")
        following = entries[number + 1].header_offset if number + 1 < len(entries) else archive.start_dir
        place = _end_of(stream, entry, following)
    if place != archive.start_dir:
        raise _unsafe(f"the directory begins at byte {archive.start_dir}, expected {place}")
    _require_end(stream, archive, len(entries))


def _end_of(stream: BinaryIO, entry: zipfile.ZipInfo, following: int) -> int:
    """Where the member ends; what describes its sizes behind it belongs to it."""
    stream.seek(entry.header_offset)
    header = stream.read(LOCAL_HEADER.size)
    if len(header) < LOCAL_HEADER.size:
        raise _unsafe(f"{entry.filename[:200]!r} is cut off")
    _, flags, method, checksum, packed, unpacked, name_bytes, extra_bytes = LOCAL_HEADER.unpack(header)
    end = entry.header_offset + LOCAL_HEADER.size + int(name_bytes) + int(extra_bytes) + entry.compress_size
    said: tuple[int, ...] = (flags & TELLING_FLAGS, method)
    expected: tuple[int, ...] = (entry.flag_bits & TELLING_FLAGS, entry.compress_type)
    if flags & SIZES_FOLLOW:
        end = following if following - end in DESCRIPTOR_BYTES else end
    else:
        said += (checksum, _size(packed, entry.compress_size), _size(unpacked, entry.file_size))
        expected += (entry.CRC, entry.compress_size, entry.file_size)
    if said != expected:
        raise _unsafe(f"{entry.filename[:200]!r} is described in two ways, {said} and {expected}")
    return end


def _size(said: int, real: int) -> int:
    return real if said == IN_EXTRA_FIELD else said


def _require_end(stream: BinaryIO, archive: zipfile.ZipFile, members: int) -> None:
    size = stream.seek(0, io.SEEK_END)
    place = size - END_RECORD.size - len(archive.comment)
    stream.seek(place)
    signature, *disks, here, in_all, _, _, comment_bytes = END_RECORD.unpack(stream.read(END_RECORD.size))
    counts = {here, in_all} - {0xFFFF}
    if signature != b"PK\x05\x06" or comment_bytes != len(archive.comment):
        raise _unsafe("something follows its end")
    if set(disks) - {0, 0xFFFF} or counts - {members}:
        raise _unsafe(f"its end tells of {in_all} members on several disks or fewer than the {members} that are there")


def _unsafe(problem: str) -> UnsafeArchive:
    return UnsafeArchive(f"the zip file is not just its members: {problem}; pack it again")
