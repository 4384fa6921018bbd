"""The adapters of a store that is asked directly, with no server: the calls of `adapters.remote`, the same answers.

What deletes takes the lock that every server holds while it is up, and is refused while one does. Knows no HTTP.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

from adapters import removal, verify
from adapters.collect import collect
from adapters.errors import Conflict, NotFound
from adapters.listing import Wanted
from adapters.records import DRAINING, Shadow, Version
from adapters.storage import open_existing
from adapters.tag_rows import OF_ADAPTER
from adapters.tags import Changes, condition
from adapters.targets import Target
from server.routes import shapes
from server.shadow_tally import Tally
from server.status import Moment

BY = "command line"
"""Who moved an alias, where no API key did."""
NO_ENGINE = Moment({})
PIECE_BYTES = 1 << 20


class Offline:
    def __init__(self, data_dir: Path, database_url: str | None, store_url: str | None) -> None:
        self._store, self._registry = open_existing(data_dir, database_url, store_url)
        self.server = self._store.location

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._registry.close()

    def adapters(self) -> Iterator[dict[str, Any]]:
        return (shapes.adapter_json(adapter, NO_ENGINE) for adapter in self._registry.adapters())

    def overviews(
        self, *, name: str | None = None, tags: Sequence[str] = (), state: str | None = None
    ) -> Iterator[dict[str, Any]]:
        wanted = Wanted(name, tuple(condition(each) for each in tags), state)
        return (shapes.overview_json(each, NO_ENGINE) for each in self._registry.overviews(wanted, limit=None))

    def adapter(self, name: str) -> dict[str, Any]:
        return shapes.adapter_json(self._registry.adapter(name), NO_ENGINE)

    def version(self, name: str, ref: str) -> dict[str, Any]:
        version = self._registry.resolve(name, ref)
        return shapes.detail_json(version, self._registry.about(version), NO_ENGINE)

    def alias(self, name: str, alias: str) -> dict[str, Any]:
        return shapes.alias_json(self._registry.alias(name, alias))

    def edit(self, name: str, version: int | None, tags: Changes) -> dict[str, Any]:
        self._registry.edit(name, version or OF_ADAPTER, tags=tags)
        return self.adapter(name) if version is None else self.version(name, str(version))

    def set_shadow(self, name: str, alias: str, shadow: Mapping[str, int] | None) -> dict[str, Any]:
        wanted = None if shadow is None else Shadow(shadow["version"], shadow["percent"])
        return shapes.adapter_json(self._registry.set_alias(name, alias, shadow=wanted, by=BY), NO_ENGINE)

    def shadow(self, name: str, alias: str) -> dict[str, Any]:
        """What was compared is known to the server that did it."""
        found = self._registry.alias(name, alias).shadow
        if found is None:
            raise NotFound(f"alias {alias!r} of {name} has no shadow")
        return {"version": found.number, "percent": found.percent} | Tally(found.number).to_json()

    def upload(self, path: Path, name: str, **_: Any) -> dict[str, Any]:
        raise Conflict(
            f"{path} was not pushed: an adapter is checked against the base model and tried by an engine before it is "
            "taken in; start the server and push it there (--server URL)",
            code="needs_server",
        )

    def set_alias(self, name: str, alias: str, target: Target) -> dict[str, Any]:
        return shapes.adapter_json(self._registry.set_alias(name, alias, target, by=BY), NO_ENGINE)

    def rollback(self, name: str, alias: str) -> dict[str, Any]:
        return shapes.adapter_json(self._registry.rollback(name, alias, by=BY), NO_ENGINE)

    def delete(self, name: str, version: int | None, wait_s: float, *, force: bool = False) -> dict[str, Any]:
        """There is nobody to wait for, and nobody to cut off."""
        with self._registry.unserved():
            if version is None:
                going = self._registry.adapter(name).versions
            else:
                going = (self._unaliased(self._registry.resolve(name, str(version))),)
            for each in going:
                self._registry.set_state(each.adapter, each.number, DRAINING)
            for each in going:
                removal.forget(self._store, self._registry, each.adapter, each.number, with_aliases=True)
        return {"object": "adapter.deleted", "versions": [each.ref for each in going], "cut": {}, "deleted": True}

    def files(self, name: str, ref: str) -> list[dict[str, Any]]:
        version, directory = self._fetched(name, ref)
        return [shapes.file_json(version, directory / file) for file in sorted(version.manifest.files)]

    @contextmanager
    def read(self, name: str, ref: str, file: str) -> Iterator[Iterator[bytes]]:
        version, directory = self._fetched(name, ref)
        if file not in version.manifest.files:
            raise NotFound(f"{version.ref} has no file {file!r}")
        with (directory / file).open("rb") as stream:
            yield iter(lambda: stream.read(PIECE_BYTES), b"")

    def gc(self, keep: int | None, *, name: str | None, dry_run: bool, wait_s: float) -> dict[str, Any]:
        with ExitStack() as held:
            if not dry_run:
                held.enter_context(self._registry.unserved())
            return collect(self._store, self._registry, keep, name=name, dry_run=dry_run).to_json() | {"done": True}

    def verify(self, *, repair: bool, progress: verify.Progress = lambda done, total, ref: None) -> dict[str, Any]:
        with ExitStack() as held:
            if repair:
                held.enter_context(self._registry.unserved())
            return verify.verify(self._store, self._registry, repair=repair, progress=progress).to_json()

    def _fetched(self, name: str, ref: str) -> tuple[Version, Path]:
        version = self._registry.resolve(name, ref)
        return version, self._store.path(version.digest)

    def _unaliased(self, version: Version) -> Version:
        if pointing := self._registry.aliases_of(version):
            raise Conflict(
                f"{version.ref} is what the alias {', '.join(pointing)} serves: move the alias, "
                f"or delete the whole adapter {version.adapter}",
                code="version_in_use",
            )
        return version
