"""Which store a setting means: the local disk, or any object store that fsspec has a driver for."""

from __future__ import annotations

from pathlib import Path

from adapters.local_store import LocalStore
from adapters.store import Store


def open_store(data_dir: Path, url: str | None = None) -> Store:
    """`url`: an fsspec URL; by default `data_dir/adapters`. Beside a bucket, `data_dir` keeps copies of its blobs."""
    if url is None:
        return LocalStore(data_dir / "adapters")
    from adapters.object_store import ObjectStore

    return ObjectStore(url, data_dir / "copies")
