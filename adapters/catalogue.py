"""What the registry holds, read: adapters, versions, aliases, tags. Every answer is of one transaction.

It changes nothing; `registry.py` is the same with what does.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sqlalchemy import Connection, select, true

from adapters import lineage, listing, merge_reports, names, rows, schema, shadow_rows, tag_rows
from adapters.database import Database
from adapters.errors import NotFound
from adapters.listing import ALL, Wanted
from adapters.meanings import Meanings
from adapters.records import CHECKING, DRAINING, About, Adapter, Alias, Move, Overview, Shadow, Version
from adapters.references import pick, unknown_ref
from adapters.servable import Answers, nobody
from adapters.targets import aliases_of


class Catalogue:
    def __init__(self, database: Database) -> None:
        self._database = database
        self._meanings = Meanings()
        self.answers: Answers = nobody
        """A server says here which versions that are merge only have an engine."""

    def adapters(self, wanted: Wanted = ALL, *, after: str = "", limit: int | None = None) -> list[Adapter]:
        """In the order of their names: those behind `after`, at most `limit`."""
        with self._database.read() as connection:
            return listing.list_adapters(connection, wanted, after, limit)

    def overviews(self, wanted: Wanted = ALL, *, after: str = "", limit: int | None = None) -> list[Overview]:
        """The same without their versions."""
        with self._database.read() as connection:
            return listing.list_overviews(connection, wanted, after, limit)

    def overview(self, name: str) -> Overview:
        with self._database.read() as connection:
            rows.require_adapter(connection, name)
            return listing.read_overviews(connection, lambda column: column == name)[0]

    def adapter(self, name: str) -> Adapter:
        with self._database.read() as connection:
            return rows.read_adapter(connection, name)

    def page(self, name: str, wanted: Wanted = ALL, *, after: int = 0, limit: int = 1000) -> Adapter:
        """The adapter with some of its versions: those with a higher number than `after`, at most `limit`."""
        with self._database.read() as connection:
            return listing.list_versions(connection, name, wanted, after, limit)

    def served(self, name: str | None = None) -> list[Overview]:
        """Adapters whose default alias has a version to serve; `name`: this one alone."""
        with self._database.read() as connection:
            return listing.list_served(connection, names.DEFAULT, name)

    def checking(self) -> list[Version]:
        """What the engine has to try before it may serve."""
        with self._database.read() as connection:
            return rows.read_state(connection, CHECKING)

    def draining(self) -> list[Version]:
        """What is being deleted."""
        with self._database.read() as connection:
            return rows.read_state(connection, DRAINING)

    def resolve(self, name: str, ref: str | None = None, *, sticky: str | None = None) -> Version:
        """`ref`: none for the default alias, a number, `latest`, `sha256:` and 12 or more hex digits, or an alias.

        Of an alias that several versions share, one that can be asked; the same one each time for the same `sticky`.
        """
        ref = names.DEFAULT if ref is None else ref
        with self._database.read() as connection:
            try:
                meant = self._meant(connection, name, ref)
                version = pick(meant, ref, sticky, self.answers)
            except NotFound:
                return pick(rows.read_adapter(connection, name), ref, sticky, self.answers)  # says what there is
        self._meanings.keep(name, ref, meant)
        return version

    def resolve_at_once(self, name: str, ref: str | None = None, *, sticky: str | None = None) -> Version | None:
        """The same in microseconds, for an event loop; None where that needs `resolve`, on a thread.

        It is as right: what was read before is used if the adapter has not changed since, in whatever process.
        """
        ref = names.DEFAULT if ref is None else ref
        meant = self._meanings.find(name, ref)
        if meant is None or meant.revision != self._database.glances.value(rows.REVISION, name=name):
            return None
        return pick(meant, ref, sticky, self.answers)

    def _meant(self, connection: Connection, name: str, ref: str) -> Adapter:
        known = self._meanings.find(name, ref)
        if known is not None and known.revision == connection.scalar(rows.REVISION, {"name": name}):
            return known
        return rows.read_meant(connection, name, ref)

    def about(self, version: Version) -> About:
        with self._database.read() as connection:
            row = rows.require_adapter(connection, version.adapter)
            targets = rows.read_targets(connection, version.adapter)
            tagged = tag_rows.read_tags(connection, version.adapter, [version.number])
            parents = lineage.parents(version.manifest.lineage)
            found = {parent: rows.find_ref(connection, parent) for parent in parents}
            tags, fidelity = tagged.get(version.number, {}), merge_reports.read_summary(connection, *version.key)
            return About(aliases_of(targets, version.number), tags, found, int(row["revision"]), fidelity)

    def merge_report(self, version: Version) -> dict[str, Any]:
        """`at`, `summary` and `report` of its last merge. NotFound where it never was merged."""
        with self._database.read() as connection:
            found = merge_reports.read_report(connection, *version.key)
        if found is None:
            raise NotFound(f"{version.ref} was not merged yet, so nothing was measured; `POST /v1/merges` does both")
        return found

    def aliases_of(self, version: Version) -> list[str]:
        """Those that point to it, alone or among others."""
        with self._database.read() as connection:
            return aliases_of(rows.read_targets(connection, version.adapter), version.number)

    def require_parents(self, parents: Iterable[str]) -> None:
        """Raises InvalidAdapter for one that names a version here which is not there."""
        with self._database.read() as connection:
            for parent in parents:
                if lineage.LOCAL.fullmatch(parent) and rows.find_ref(connection, parent) is None:
                    raise lineage.unknown_parent(parent)

    def alias(self, name: str, alias: str) -> Alias:
        """Also one that is gone. NotFound where it never was."""
        with self._database.read() as connection:
            row = rows.require_adapter(connection, name)
            target = rows.read_targets(connection, name, schema.alias_targets.c.alias == alias).get(alias, {})
            moves = tuple(move for _, move in rows.read_moves(connection, name, alias))
            if not moves and not target:
                raise unknown_ref(rows.read_adapter(connection, name), alias)
            shadow = shadow_rows.shadows_of(connection, name).get(alias)
            return Alias(name, alias, target, shadow, moves, row["revision"])

    def moves(self, name: str, alias: str) -> list[Move]:
        """Of an alias, the latest first, also when it is gone. NotFound where it never was."""
        return list(self.alias(name, alias).moves)

    def shadows(self) -> dict[tuple[str, str], Shadow]:
        """Adapter and alias → its shadow, of all that have one."""
        with self._database.read() as connection:
            found = shadow_rows.read_shadows(connection, true())
        return {(name, alias): shadow for name, shadows in found.items() for alias, shadow in shadows.items()}

    def digests(self) -> set[str]:
        """All digests that some version still refers to, whatever its state."""
        with self._database.read() as connection:
            return set(connection.scalars(select(schema.versions.c.digest)))
