"""Which store a setting means: the local disk, or any object store that fsspec has a driver for; and whose it is."""

from __future__ import annotations

from pathlib import Path

from adapters.errors import NotFound, StoreError
from adapters.local_store import LocalStore
from adapters.registry import Registry
from adapters.store import Store, require_owner


def open_store(data_dir: Path, url: str | None = None) -> Store:
    """`url`: an fsspec URL; by default `data_dir/adapters`. Beside a bucket, `data_dir` keeps copies of its blobs."""
    if url is None:
        return LocalStore(data_dir / "adapters")
    from adapters.object_store import ObjectStore

    return ObjectStore(url, data_dir / "copies")


def registry_url(data_dir: Path, database_url: str | None) -> str:
    return database_url or f"sqlite:///{(data_dir / 'registry.db').absolute()}"


def tie(store: Store, registry: Registry) -> None:
    """A store is one registry's, and a registry's files are in one store: StoreError for a pair that is none."""
    if store.owner() is None and registry.digests() and not store.size_bytes():
        raise StoreError(
            f"the registry has versions, but the store {store.location} is empty; point store_url and data_dir to "
            "where their files are, or copy `blobs/` there first",
            code="other_store",
        )
    store.claim(registry.identity)


def open_existing(data_dir: Path, database_url: str | None, url: str | None) -> tuple[Store, Registry]:
    """What a server has made before; nothing is made anew. NotFound and StoreError where it is not there."""
    database, files = data_dir / "registry.db", data_dir / "adapters" / "registry"
    for path, wanted, flag in ((database, database_url is None, "--database-url"), (files, url is None, "--store-url")):
        if wanted and not path.exists():
            raise NotFound(
                f"{path} does not exist; give the data_dir of a server that has been started, and where its settings "
                f"say so {flag}"
            )
    registry = Registry(registry_url(data_dir, database_url))
    try:
        store = open_store(data_dir, url)
        require_owner(store.location, store.owner(), registry.identity)
    except BaseException:
        registry.close()
        raise
    return store, registry
