"""`s3://bucket/folder` and every other protocol of fsspec: a folder or an archive, with the server's own credentials.

Asks for the names that are kept and never lists: a prefix may hold millions of keys. What credentials and endpoints
there are is the driver's affair (AWS_… for s3).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

from adapters.errors import SourceError
from adapters.sources.address import Policy, Source
from adapters.sources.remote_file import SILENCE_S, Listing, RemoteFile, require_archive
from adapters.upload import KEPT

BLOCK_BYTES = 8 << 20
"""Read by one request, and held in memory."""
S3 = {"config_kwargs": {"connect_timeout": 10, "read_timeout": SILENCE_S, "retries": {"max_attempts": 2}}}
OPTIONS: Mapping[str, Mapping[str, Any]] = {"s3": S3, "s3a": S3}


@contextmanager
def listing(source: Source, _: Policy) -> Iterator[Listing]:
    files, path = _filesystem(source)
    if (found := files.info(path))["type"] == "file":
        kept = [_file(files, require_archive(source.last_part), found)]
    else:
        kept = [_file(files, name, found) for name in sorted(KEPT) if (found := _found(files, f"{path}/{name}"))]
    yield Listing(tuple(kept), {"url": source.shown})


def _filesystem(source: Source) -> tuple[Any, str]:
    import fsspec

    try:
        fsspec.get_filesystem_class(source.protocol)
    except ValueError:
        raise SourceError(f"{source.protocol}:// is a protocol that nobody here knows; check its spelling") from None
    options = OPTIONS.get(source.protocol, {})
    files, path = fsspec.core.url_to_fs(source.text, use_listings_cache=False, **options)
    return files, str(path).rstrip("/")


def _found(files: Any, path: str) -> dict[str, Any] | None:
    try:
        info: dict[str, Any] = files.info(path)
    except FileNotFoundError:
        return None
    return info if info["type"] == "file" else None


def _file(files: Any, name: str, info: Mapping[str, Any]) -> RemoteFile:
    size = info.get("size")
    return RemoteFile(name, None if size is None else int(size), partial(_opened, files, str(info["name"])))


def _opened(files: Any, path: str) -> AbstractContextManager[Any]:
    opened: AbstractContextManager[Any] = files.open(path, "rb", block_size=BLOCK_BYTES, cache_type="readahead")
    return opened
