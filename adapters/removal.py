"""The way out: a version is unregistered and its files go; and what crashes left is swept.

The registry forgets first, so that a crash leaves files that nobody knows, never a version without files. Knows no
engine: whoever removes a version makes sure first that nobody uses it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

from adapters.registry import Registry
from adapters.store import Store


@contextmanager
def agreeing(store: Store, registry: Registry) -> Iterator[None]:
    """One at a time makes files and registry agree, of all machines that share the two. Not reentrant."""
    with registry.alone(), store.lock():
        yield


def forget(store: Store, registry: Registry, name: str, number: int, *, with_aliases: bool = False) -> None:
    """Unregister a version and delete its files. Conflict while an alias points to it, unless those go too."""
    with agreeing(store, registry):
        digest = registry.resolve(name, str(number)).digest
        registry.remove_version(name, number, with_aliases=with_aliases)
        delete_unreferenced(store, registry, digest)


def sweep(store: Store, registry: Registry, *, keep: Collection[str] = (), dry_run: bool = False) -> list[str]:
    """Remove what crashed uploads and deletions left; returns what went, or would go. `keep`: digests still in use."""
    with agreeing(store, registry):
        look = store.leftovers if dry_run else store.sweep
        return look(registry.digests().union(keep))


def delete_unreferenced(store: Store, registry: Registry, digest: str) -> None:
    """The caller holds the lock. Another version may have the same bytes."""
    if digest not in registry.digests():
        store.delete(digest)
