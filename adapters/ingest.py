"""The one door in and out: compare sums → unpack → judge → publish → register, and unregister → delete.

Files go first and the registry commits last, so a crash leaves at most a blob that nobody knows, which `sweep` removes
at the next start. It knows no HTTP and no engine: whoever deletes a version makes sure first that nobody uses it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import replace
from pathlib import Path

from adapters import checksums, removal
from adapters.archive import unpack
from adapters.base import BaseModel
from adapters.errors import StoreError, UploadError
from adapters.gate import judge
from adapters.lineage import merged, parents, require_lineage
from adapters.manifest import Manifest
from adapters.names import require_description, require_name
from adapters.refusals import refuse
from adapters.registry import Registry, Version
from adapters.removal import agreeing, delete_unreferenced
from adapters.storage import tie
from adapters.store import Store
from adapters.tags import require_tags
from adapters.upload import PLAIN, UploadedFile, UploadLimits, UploadOptions


class Ingest:
    """Safe to call from several threads and processes on the same store and registry."""

    def __init__(self, store: Store, registry: Registry, base: BaseModel, limits: UploadLimits, max_rank: int) -> None:
        self._store = store
        self._registry = registry
        self._base = base
        self._limits = limits
        self._max_rank = max_rank
        tie(store, registry)

    def upload(self, name: str, files: Sequence[UploadedFile], options: UploadOptions = PLAIN) -> tuple[Version, bool]:
        """The version, and whether it is new. After any failure store and registry are what they were."""
        self.require_possible(name, options)
        with self._store.staging() as staged:
            packed = checksums.check_sent(files, options.sha256)
            unpack(files, staged, self._limits)
            checksums.check_unpacked(staged, packed)
            manifest = judge(staged, self._base, self._max_rank, options.max_error)
            lineage = merged(manifest.lineage, options.lineage)
            fetched = {} if options.source is None else {"source": dict(options.source)}
            manifest = replace(manifest, lineage=lineage | fetched)
            self._store.prepare(staged, manifest.digest)
            with agreeing(self._store, self._registry):
                return self._admit(name, staged, manifest, options)

    def require_possible(self, name: str, options: UploadOptions = PLAIN) -> None:
        """Raises what `upload` would raise before it looks at any file."""
        self._require_free(name)
        require_description(options.description)
        checksums.require_sha256(options.sha256)
        require_tags(options.tags)
        require_lineage(options.lineage)
        self._registry.require_parents(parents(options.lineage))

    def scratch(self) -> AbstractContextManager[Path]:
        """An empty directory on the disk where uploads are unpacked; gone at the end of the block, or after a crash."""
        return self._store.staging()

    def directory(self, name: str, path: Path, options: UploadOptions = PLAIN) -> tuple[Version, bool]:
        """As `upload`, from a local PEFT directory (its sub-directories are not looked at)."""
        if not path.is_dir():
            raise UploadError(f"{path} is not a directory; give one that PEFT's save_pretrained wrote")
        with ExitStack() as stack:
            files = [
                UploadedFile(file.name, stack.enter_context(file.open("rb")))
                for file in sorted(path.iterdir())
                if file.is_file()
            ]
            return self.upload(name, files, options)

    def forget(self, name: str, number: int, *, with_aliases: bool = False) -> None:
        removal.forget(self._store, self._registry, name, number, with_aliases=with_aliases)

    def sweep(self, *, keep: Collection[str] = (), dry_run: bool = False) -> list[str]:
        return removal.sweep(self._store, self._registry, keep=keep, dry_run=dry_run)

    def _require_free(self, name: str) -> None:
        require_name(name)
        if name == self._base.name:
            raise refuse("bad_name", f"{name!r} is the base model's name, expected one of its own")

    def _admit(self, name: str, staged: Path, manifest: Manifest, options: UploadOptions) -> tuple[Version, bool]:
        try:
            self._store.publish(staged, manifest.digest)
            return self._registry.add_version(
                name,
                manifest,
                description=options.description,
                promote=options.promote,
                by=options.by,
                tags=options.tags,
                probe=options.probe,
            )
        except BaseException:
            with suppress(StoreError):  # what cannot be deleted now is swept later; the first error is the one to hear
                delete_unreferenced(self._store, self._registry, manifest.digest)
            raise
