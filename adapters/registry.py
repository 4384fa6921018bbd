"""Which adapter versions exist, what state they are in and which alias points where; durable in a SQL database.

Every write is one transaction. It knows digests, not files: adapters/ingest.py keeps the two in step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from enum import Enum
from typing import Any

from sqlalchemy import Connection, select
from sqlalchemy.exc import DBAPIError, IntegrityError

from adapters import alias_changes, checking, lineage, merge_reports, migrations, names, rows, schema, tag_rows
from adapters.catalogue import Catalogue
from adapters.database import Database
from adapters.errors import Changed, Conflict, StoreError
from adapters.holds import judge_all, require_unread
from adapters.manifest import Manifest
from adapters.records import (
    CHECKING,
    DRAINING,
    FAILED,
    READY,
    STATES,
    About,
    Adapter,
    Alias,
    Move,
    Overview,
    Shadow,
    Version,
)
from adapters.references import listed, living
from adapters.retention import Judgement
from adapters.tag_rows import OF_ADAPTER
from adapters.tags import NO_TAGS, Changes, changed, require_tags
from adapters.targets import Target, aliases_of, require_percent, require_target

__all__ = ["About", "Adapter", "Alias", "Move", "Overview", "Registry", "Shadow", "Version"]

Revisions = frozenset[int] | None
"""Of an adapter: those at which a change may happen. None: at any."""


class Keep(Enum):
    """A description or a shadow that stays as it is; None would take it away."""

    IT = 0


class Registry(Catalogue):
    """Safe to share between threads; several processes may open the same database."""

    def __init__(self, url: str) -> None:
        super().__init__(Database(url))
        try:
            with self._database.write() as connection:
                migrations.upgrade(connection)
        except BaseException as error:
            self._database.close()
            if not isinstance(error, DBAPIError):
                raise
            raise StoreError(
                f"the registry database {self._database.shown_url} cannot be opened: {error.orig}; "
                "check that its directory or server exists and that it is a database"
            ) from error

    @property
    def database(self) -> Database:
        """For what lives in the same database."""
        return self._database

    @property
    def identity(self) -> str:
        """32 hex digits made with the database: the same for every process that opens it."""
        with self._database.read() as connection:
            return str(connection.scalar(select(schema.identity.c.identity)))

    def alone(self) -> AbstractContextManager[None]:
        """Held by whoever makes files and registry agree, on whatever machine. Not reentrant."""
        return self._database.alone()

    def serving(self) -> AbstractContextManager[None]:
        """Held by every server while it is up."""
        return self._database.serving()

    def unserved(self) -> AbstractContextManager[None]:
        """Held by whoever deletes with no server to wait for requests. Conflict while one is up."""
        return self._database.unserved()

    def close(self) -> None:
        self._database.close()

    def add_version(
        self,
        name: str,
        manifest: Manifest,
        *,
        description: str | None = None,
        promote: bool = True,
        by: str | None = None,
        tags: Changes = NO_TAGS,
        probe: bool = False,
    ) -> tuple[Version, bool]:
        """The version, and whether it is new: the same bytes under the same name are the same version.

        `probe`: it stays in `checking`, and no alias moves, until `admit`.
        """
        names.require_name(name)
        names.require_description(description)
        require_tags(tags)
        try:
            return self._add_version(name, manifest, description, promote, by, tags, probe)
        except IntegrityError:  # another process registered the same new name first
            return self._add_version(name, manifest, description, promote, by, tags, probe)

    def _add_version(
        self,
        name: str,
        manifest: Manifest,
        description: str | None,
        promote: bool,
        by: str | None,
        tags: Changes,
        probe: bool,
    ) -> tuple[Version, bool]:
        with self._database.write() as connection:
            last = rows.open_adapter(connection, name, description)
            rows.touch(connection, name)
            known = living(rows.read_same(connection, name, manifest.digest), manifest.digest)
            number = known.number if known else rows.insert_version(connection, name, last + 1, manifest)
            if known is not None:
                _learn(connection, known, manifest)
            _tag(connection, name, number, tags)
            version = rows.require_version(connection, name, number)
            promote = promote or not _has_default(rows.read_meant(connection, name, names.DEFAULT))
            if version.state == CHECKING or (probe and (version.state == FAILED or _is_new(known, version))):
                checking.begin(connection, version, promote=promote, by=by)
                version = rows.require_version(connection, name, number)
            elif version.state == READY and promote:
                rows.move(connection, name, names.DEFAULT, {number: 1}, "upload", by=by)
            return version, known is None

    def count_attempt(self, version: Version, change: int = 1) -> int:
        """How often the engine has tried it, the time that begins now included."""
        with self._writing(version.adapter) as connection:
            return checking.count_attempt(
                connection, rows.require_version(connection, version.adapter, version.number), change
            )

    def admit(self, version: Version, findings: Mapping[str, Any]) -> bool:
        """It passed: `ready` from now on, and what its upload asked for happens. Whether it was still in `checking`."""
        with self._writing(version.adapter) as connection:
            return checking.admit(
                connection, rows.require_version(connection, version.adapter, version.number), findings
            )

    def reject(self, version: Version, reason: str) -> bool:
        """It did not pass: `failed`. Whether it was still in `checking`."""
        with self._writing(version.adapter) as connection:
            return checking.reject(
                connection, rows.require_version(connection, version.adapter, version.number), reason
            )

    def set_merge_report(self, version: Version, summary: Mapping[str, Any], report: Mapping[str, Any]) -> None:
        """In place of the one before. NotFound where the version is gone."""
        with self._writing(version.adapter) as connection:
            rows.require_version(connection, *version.key)
            merge_reports.write_report(connection, *version.key, summary, report)

    def edit(
        self,
        name: str,
        number: int = OF_ADAPTER,
        *,
        description: str | Keep | None = Keep.IT,
        tags: Changes = NO_TAGS,
        expected: Revisions = None,
    ) -> None:
        """Of an adapter, its description and tags; of one of its versions, whose files never change, the tags."""
        require_tags(tags)
        with self._writing(name, expected) as connection:
            if number != OF_ADAPTER:
                rows.require_version(connection, name, number)
            _tag(connection, name, number, tags)
            if not isinstance(description, Keep):
                names.require_description(description)
                rows.describe(connection, name, description)

    def set_alias(
        self,
        name: str,
        alias: str,
        target: int | Target | None = None,
        *,
        shadow: Shadow | Keep | None = Keep.IT,
        by: str | None = None,
        expected: Revisions = None,
    ) -> Adapter:
        """To one version, or to several with weights; without a target it stays where it is. `shadow`: None: none."""
        target = {target: 1} if isinstance(target, int) else target
        names.require_alias(alias)
        if target is not None:
            require_target(target)
        if isinstance(shadow, Shadow):
            require_percent(shadow.percent)
        with self._writing(name, expected) as connection:
            if target is not None:
                alias_changes.move(connection, name, alias, target, by, self.answers)
            if not isinstance(shadow, Keep):
                alias_changes.set_shadow(connection, name, alias, shadow)
            return rows.read_adapter(connection, name)

    def rollback(
        self, name: str, alias: str = names.DEFAULT, *, by: str | None = None, expected: Revisions = None
    ) -> Adapter:
        """Take back the last move of the alias; once more, the one before it. Conflict where there is nothing to go
        back to, or what it pointed to cannot serve any more."""
        with self._writing(name, expected) as connection:
            alias_changes.roll_back(connection, name, alias, by, self.answers)
            return rows.read_adapter(connection, name)

    def remove_alias(self, name: str, alias: str, *, by: str | None = None, expected: Revisions = None) -> Adapter:
        with self._writing(name, expected) as connection:
            alias_changes.remove(connection, name, alias, by)
            return rows.read_adapter(connection, name)

    def set_state(
        self, name: str, number: int, state: str, reason: str | None = None, *, only_from: str | None = None
    ) -> bool:
        """Whether it changed: with `only_from` it stays as it is when it was in any other state."""
        assert state in STATES, state
        with self._writing(name) as connection:
            version = rows.require_version(connection, name, number)
            if only_from not in (None, version.state):
                return False
            rows.set_state(connection, name, number, state, reason)
            return True

    def retire(
        self, name: str, keep: int | None, in_use: Callable[[Version], bool] = lambda _: False, *, dry_run: bool = False
    ) -> list[Judgement]:
        """Judge every version, and mark those that may go as draining: at once, so that no alias moves to one."""
        with self._database.read() as connection:
            judged = judge_all(connection, name, keep, in_use)
        if dry_run or not any(each.goes for each in judged):
            return judged
        with self._writing(name) as connection:
            judged = judge_all(connection, name, keep, in_use)
            for each in (each.version for each in judged if each.goes):
                rows.set_state(connection, name, each.number, DRAINING)
            return judged

    def drain(self, name: str, number: int | None = None) -> list[Version]:
        """Mark a version as draining that no alias points to, or all of the adapter, at once: no crash, no other call
        comes in between. Conflict while a job reads one of them."""
        with self._writing(name) as connection:
            if number is None:
                going = rows.read_versions(connection, name)
            else:
                going = [_require_unaliased(connection, name, number)]
            require_unread(connection, going)
            for version in going:
                rows.set_state(connection, name, version.number, DRAINING)
            return going

    def remove_version(self, name: str, number: int, *, with_aliases: bool = False) -> None:
        """Conflict while an alias points to it, unless those go too. The adapter goes with its last version."""
        with self._writing(name) as connection:
            (rows.require_version if with_aliases else _require_unaliased)(connection, name, number)
            rows.delete_version(connection, name, number)
            if not rows.has_versions(connection, name):
                rows.bury(connection, name)

    @contextmanager
    def _writing(self, name: str, expected: Revisions = None) -> Iterator[Connection]:
        """A write transaction that holds the adapter's row. NotFound when there is none, Changed when it is at none of
        the revisions that were expected."""
        with self._database.write() as connection:
            row = rows.require_adapter(connection, name, lock=True)
            if expected is not None and row["revision"] not in expected:
                raise Changed(
                    f"adapter {name!r} has changed since you read it: it is at revision {row['revision']}, expected "
                    f"was {listed([str(each) for each in sorted(expected)])}; read it again, then decide"
                )
            rows.touch(connection, name)
            yield connection


def _is_new(known: Version | None, version: Version) -> bool:
    return known is None and version.state == READY


def _learn(connection: Connection, known: Version, manifest: Manifest) -> None:
    """Lineage that was not known when these bytes came first."""
    merged = lineage.merged(known.manifest.lineage, manifest.lineage)
    if merged != known.manifest.lineage:
        learned = replace(known.manifest, lineage=merged)
        rows.set_manifest(connection, known.adapter, known.number, learned)


def _tag(connection: Connection, name: str, number: int, tags: Changes) -> None:
    if tags:
        changed(tag_rows.read_tags(connection, name, [number]).get(number, {}), tags)
        tag_rows.write_tags(connection, name, number, tags)


def _has_default(adapter: Adapter) -> bool:
    """A default that is being deleted is none: it goes with its version."""
    target = adapter.targets.get(names.DEFAULT, {})
    return any(version.number in target and version.state != DRAINING for version in adapter.versions)


def _require_unaliased(connection: Connection, name: str, number: int) -> Version:
    version = rows.require_version(connection, name, number)
    if pointing := aliases_of(rows.read_targets(connection, name), number):
        raise Conflict(
            f"{version.ref} is what the alias {listed(pointing)} serves: move or remove the alias, or delete the whole "
            f"adapter {name}",
            code="version_in_use",
        )
    return version
