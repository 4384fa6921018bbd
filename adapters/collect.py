"""FLOW garbage collection: judge → retire → remove → sweep; here straight on a store that no server uses.

A server does the same through server/lifecycle, which waits for requests that run.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from adapters import removal
from adapters.errors import NotFound
from adapters.records import Version
from adapters.registry import Registry
from adapters.retention import REASONS, Judgement
from adapters.store import Store


@dataclass(frozen=True)
class Collected:
    """What went, or would go in a dry run, and why the rest stays."""

    judged: tuple[Judgement, ...]
    swept: tuple[str, ...]
    """Blobs (by digest) and staging directories that nobody refers to."""
    dry_run: bool

    def to_json(self) -> dict[str, Any]:
        kept = [each for each in self.judged if each.reason]
        return {
            "object": "adapter.gc",
            "dry_run": self.dry_run,
            "deleted": [_facts(each.version) for each in self.judged if each.goes],
            "kept": [_facts(each.version) | {"reason": each.reason} for each in kept],
            "reasons": {each.reason: REASONS[each.reason] for each in kept if each.reason},
            "swept": list(self.swept),
        }


def collect(
    store: Store, registry: Registry, keep: int | None, *, name: str | None = None, dry_run: bool = False
) -> Collected:
    """Of one adapter, or of all. `keep`: how many of the newest versions stay; None: all, and only leftovers go."""
    judged: list[Judgement] = []
    for adapter in chosen(registry, name):
        with suppress(NotFound):  # gone meanwhile
            judged += registry.retire(adapter, keep, dry_run=dry_run)
    if not dry_run:
        finish(store, registry)
    return Collected(tuple(judged), tuple(removal.sweep(store, registry, dry_run=dry_run)), dry_run)


def chosen(registry: Registry, name: str | None) -> list[str]:
    """The names that are meant. NotFound for one that is not there."""
    return [registry.adapter(name).name] if name else [adapter.name for adapter in registry.adapters()]


def finish(store: Store, registry: Registry) -> None:
    """Every deletion that was begun, here or by a server that stopped in the middle of it."""
    for version in registry.draining():
        removal.forget(store, registry, version.adapter, version.number, with_aliases=True)


def _facts(version: Version) -> dict[str, Any]:
    return {
        "name": version.adapter,
        "version": version.number,
        "digest": version.digest,
        "state": version.state,
        "size_bytes": version.manifest.size_bytes,
    }
