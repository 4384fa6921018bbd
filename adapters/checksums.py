"""The SHA-256 that a client says its files have, against what arrived. Knows no gate and stores nothing."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from adapters.archive import is_archive
from adapters.errors import ChecksumMismatch, UploadError
from adapters.upload import WEIGHTS, UploadedFile

HEX = re.compile(r"[0-9a-f]{64}")
MAX_NAMES = 1000
CHUNK_BYTES = 1 << 18

Sha256 = str | Mapping[str, str]
"""Of the one archive as sent or, among loose files, of the weights; or file name → hex."""


def sha256_of(path: Path) -> str:
    with path.open("rb") as stream:
        return _sha256(stream)


def require_sha256(given: Sha256 | None) -> None:
    """Raises UploadError for what cannot be one, before anything is read."""
    found = {"": given} if isinstance(given, str) else given or {}
    wrong = next((value for value in found.values() if HEX.fullmatch(value.lower()) is None), None)
    if wrong is not None or len(found) > MAX_NAMES:
        raise UploadError(
            f"sha256 is {wrong!r:.80}, expected 64 hex digits, or an object of file name to 64 hex digits",
            code="bad_sha256",
        )


def check_sent(files: Sequence[UploadedFile], given: Sha256 | None) -> dict[str, str]:
    """Compare what was sent as it was sent; streams stand at their start again. Returns what is named but was not sent
    by itself, and so must lie in the archive. Raises ChecksumMismatch."""
    require_sha256(given)
    expected = _by_name(files, given)
    for file in files:
        hexed = expected.pop(_last_part(file.filename), None) if expected else None
        if hexed is not None:
            _require_equal(file.filename, hexed, _sha256(file.stream))
            file.stream.seek(0)
    return expected


def check_unpacked(staged: Path, expected: Mapping[str, str]) -> None:
    """Compare files that came out of an archive. Raises ChecksumMismatch, also for one that is not there."""
    for name, hexed in expected.items():
        path = staged / _last_part(name)
        if not path.is_file():
            raise ChecksumMismatch(f"sha256 names {name[:200]!r}, which was not sent or is not kept; name what is sent")
        _require_equal(name, hexed, sha256_of(path))


def _by_name(files: Sequence[UploadedFile], given: Sha256 | None) -> dict[str, str]:
    if not isinstance(given, str):
        return {_last_part(name): hexed for name, hexed in (given or {}).items()}
    archives = [_last_part(file.filename) for file in files if is_archive(file.filename)]
    return {archives[0] if archives else WEIGHTS: given}


def _require_equal(name: str, expected: str, actual: str) -> None:
    if expected.lower() != actual:
        raise ChecksumMismatch(
            f"{name[:200]!r} arrived with the SHA-256 {actual}, expected {expected.lower()}; send it again, or correct "
            "sha256"
        )


def _last_part(name: str) -> str:
    return PurePosixPath(name).name


def _sha256(stream: BinaryIO) -> str:
    digest = hashlib.sha256()
    while chunk := stream.read(CHUNK_BYTES):
        digest.update(chunk)
    return digest.hexdigest()
