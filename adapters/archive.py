"""An uploaded tar, zip or set of files → the files we keep, in a staging directory. The only place that unpacks
strangers' files: it trusts no declared size, writes only names from our own list, and follows no links.

It does not know what a valid adapter is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO
from unicodedata import normalize

from adapters.archive_members import Member, read_tar, read_zip
from adapters.errors import StoreError, UnsafeArchive, UploadError, UploadTooLarge
from adapters.upload import UploadedFile, UploadLimits, is_kept, safe_parts

__all__ = ["UploadLimits", "UploadedFile", "unpack"]

CHUNK_BYTES = 1 << 16
TARS = (".tar.gz", ".tgz", ".tar")
ARCHIVES = (*TARS, ".zip")


def is_archive(filename: str) -> bool:
    return filename.lower().endswith(ARCHIVES)


def unpack(files: Sequence[UploadedFile], into: Path, limits: UploadLimits) -> None:
    """Write the kept files flat into `into`. Raises UploadError, or InvalidAdapter for pickles."""
    seen: set[tuple[str, ...]] = set()
    roots: set[tuple[str, ...]] = set()
    left = limits.max_bytes
    for count, member in enumerate(_members(files, limits), start=1):
        if count > limits.max_files:
            raise UploadTooLarge(f"more than {limits.max_files} files; upload only the adapter's own")
        parts = safe_parts(member.name)
        _require_new(parts, seen)
        if member.is_file and is_kept(parts):
            _require_one_root(parts, roots)
            left -= _write(member, into / parts[-1], left, limits)


def _members(files: Sequence[UploadedFile], limits: UploadLimits) -> Iterator[Member]:
    archives = [file for file in files if is_archive(file.filename)]
    if not files or (archives and len(files) > 1):
        raise UploadError(f"got {len(files)} files; expected one archive ({', '.join(ARCHIVES)}) or the loose files")
    if not archives:
        return (Member(file.filename, True, _chunks_of(file.stream)) for file in files)
    name, stream = archives[0].filename.lower(), archives[0].stream
    return read_tar(stream, name.endswith("gz"), limits) if name.endswith(TARS) else read_zip(stream, limits)


def _chunks_of(stream: BinaryIO) -> Iterator[bytes]:
    return iter(lambda: stream.read(CHUNK_BYTES), b"")


def _require_new(parts: tuple[str, ...], seen: set[tuple[str, ...]]) -> None:
    """Not even in another case or spelling: some disks take them for the same file."""
    folded = tuple(normalize("NFKC", part).casefold() for part in parts)
    if folded in seen:
        raise UnsafeArchive(f"{'/'.join(parts)[:200]!r} occurs twice; send each file once")
    seen.add(folded)


def _require_one_root(parts: tuple[str, ...], roots: set[tuple[str, ...]]) -> None:
    roots.add(parts[:-1])
    if len(roots) > 1:
        places = " and ".join(sorted(ascii("/".join(root)[:80]) if root else "the root" for root in roots))
        raise UploadError(f"adapter files lie in {places}; send one adapter in one directory", code="nesting")


def _write(member: Member, path: Path, left: int, limits: UploadLimits) -> int:
    """Counts what comes out, not what was declared."""
    written = 0
    try:
        with path.open("xb") as file:
            for chunk in member.chunks:
                written += len(chunk)
                if written > left:
                    raise UploadTooLarge(
                        f"unpacks to more than {limits.max_bytes} bytes, the limit for all files; send only the "
                        "adapter's own"
                    )
                file.write(chunk)
    except OSError as error:
        raise StoreError(f"could not write the upload: {error}; check the disk's space and permissions") from error
    return written
