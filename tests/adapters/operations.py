"""What can be done to a registry and its store, one operation at a time, chosen at random from what is there; and all
that there is, as JSON that can be compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from adapters import collect
from adapters.archive import UploadLimits
from adapters.base import BaseModel
from adapters.errors import AdapterError
from adapters.ingest import Ingest
from adapters.local_store import LocalStore
from adapters.object_store import ObjectStore
from adapters.registry import Registry
from adapters.store import Store
from adapters.upload import UploadOptions
from tests.adapters.factories import AdapterFiles, lora_tensors, tar, uploaded
from tests.adapters.hostile_weights import adalora

State = dict[str, Any]
NAMES = ("a", "b", "c")
BYTES = 6
"""Different adapters that are uploaded; so the same bytes come again, under the same name and under others."""


@dataclass(frozen=True)
class Place:
    """Where a registry and its store lie."""

    root: Path
    database: str | None = None
    """SQLite in `root` by default."""
    bucket: str | None = None
    store: str = "store"
    """The directory of the local store, or of the bucket's copies."""

    def open(self, base: BaseModel) -> World:
        registry = Registry(self.database or f"sqlite:///{self.root}/registry.db")
        store: Store = LocalStore(self.root / self.store)
        if self.bucket is not None:
            store = ObjectStore(self.bucket, self.root / self.store, grace_s=0)
        return World(store, registry, Ingest(store, registry, base, UploadLimits(), max_rank=16))


@dataclass(frozen=True)
class World:
    store: Store
    registry: Registry
    ingest: Ingest

    def recover(self) -> None:
        """As a server does when it starts."""
        self.ingest.sweep()
        collect.finish(self.store, self.registry)

    def state(self) -> State:
        """All that a client could tell apart."""
        return {
            "blobs": sorted(self.store.digests()),
            **{
                adapter.name: {
                    "versions": {str(each.number): [each.digest, each.state] for each in adapter.versions},
                    "targets": {alias: dict(_plain(target)) for alias, target in sorted(adapter.targets.items())},
                    "moves": {
                        alias: [
                            [dict(_plain(move.old)), dict(_plain(move.new)), move.how, move.undone]
                            for move in self.registry.moves(adapter.name, alias)
                        ]
                        for alias in sorted(adapter.targets)
                    },
                }
                for adapter in self.registry.adapters()
            },
        }


def _plain(target: Mapping[int, int]) -> Iterator[tuple[str, int]]:
    return ((str(number), weight) for number, weight in sorted(target.items()))


@dataclass(frozen=True)
class Operation:
    kind: str
    name: str
    number: int = 0
    other: int = 0

    def run(self, world: World) -> str:
        """The code of the refusal where it is one."""
        try:
            getattr(self, f"_{self.kind}")(world)
        except AdapterError as error:
            return error.code
        return ""

    def _upload(self, world: World) -> None:
        files = AdapterFiles(tensors=lora_tensors(seed=self.number)).files()
        if self.number == 0:
            files = dict(adalora({}))
        packed = uploaded("a.tar.gz", tar(files)) if self.number % 2 else AdapterFiles(tensors={}).uploads()
        if not self.number % 2:
            packed = [item for name, content in files.items() for item in uploaded(name, content)]
        world.ingest.upload(self.name, packed, UploadOptions(promote=self.other == 0))

    def _promote(self, world: World) -> None:
        world.registry.set_alias(self.name, ("default", "stable")[self.other % 2], self.number)

    def _split(self, world: World) -> None:
        world.registry.set_alias(self.name, "default", {self.number: 90, self.other: 10})

    def _rollback(self, world: World) -> None:
        world.registry.rollback(self.name)

    def _unalias(self, world: World) -> None:
        world.registry.remove_alias(self.name, "stable")

    def _delete(self, world: World) -> None:
        world.ingest.forget(self.name, self.number, with_aliases=self.other % 2 == 1)

    def _collect(self, world: World) -> None:
        collect.collect(world.store, world.registry, 1, name=self.name)


KINDS = ("upload", "upload", "promote", "split", "rollback", "unalias", "delete", "delete", "collect", "collect")


def choose(chance: Random, state: Mapping[str, Any]) -> Operation:
    """One that means something more often than not."""
    kind = chance.choice(KINDS)
    name = chance.choice(NAMES)
    there = sorted(name for name in state if name != "blobs")
    if kind == "upload" or not there:
        return Operation("upload", name, chance.randrange(BYTES), chance.randrange(3))
    name = chance.choice(there)
    numbers = [int(number) for number in state[name]["versions"]]
    return Operation(kind, name, chance.choice(numbers), chance.choice(numbers))
