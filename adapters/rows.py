"""The registry's rows, read and written inside a transaction that the caller holds. Knows no rules about aliases."""

from __future__ import annotations

from datetime import UTC, datetime

from sqlalchemy import Connection, Row, delete, insert, select, update

from adapters import names, schema
from adapters.errors import NotFound
from adapters.manifest import Manifest
from adapters.records import READY, Adapter, Move, Version
from adapters.references import listed, only
from adapters.targets import Target, from_json, to_json

MOVES_KEPT = 100
"""Of an alias; older ones are forgotten."""


def open_adapter(connection: Connection, name: str, description: str | None) -> int:
    """Lock the adapter's row, making or reviving it; returns the last number given out."""
    table = schema.adapters
    row = connection.execute(select(table).where(table.c.name == name).with_for_update()).one_or_none()
    now = datetime.now(UTC)
    if row is None:
        connection.execute(insert(table).values(name=name, description=description, created_at=now, last_number=0))
        return 0
    changes: dict[str, object] = {}
    if row.removed_at is not None:
        changes = {"removed_at": None, "created_at": now, "description": description}
    elif description is not None:
        changes = {"description": description}
    if changes:
        connection.execute(update(table).where(table.c.name == name).values(changes))
    return int(row.last_number)


def bury(connection: Connection, name: str) -> None:
    table = schema.adapters
    connection.execute(update(table).where(table.c.name == name).values(removed_at=datetime.now(UTC)))


def insert_version(connection: Connection, name: str, number: int, manifest: Manifest) -> int:
    connection.execute(
        insert(schema.versions).values(
            adapter=name,
            number=number,
            digest=manifest.digest,
            state=READY,
            created_at=datetime.now(UTC),
            manifest=manifest.to_json(),
        )
    )
    table = schema.adapters
    connection.execute(update(table).where(table.c.name == name).values(last_number=number))
    return number


def move(connection: Connection, name: str, alias: str, target: Target, how: str, *, by: str | None = None) -> None:
    """Point the alias somewhere else, or remove it (an empty target), and keep a record. Nothing if it is there."""
    table, moves = schema.alias_targets, schema.alias_moves
    if len(target) == 1:
        target = dict.fromkeys(target, 1)  # a weight says something beside another only
    old = read_targets(connection, name).get(alias, {})
    if old == target:
        return
    connection.execute(delete(table).where(table.c.adapter == name, table.c.alias == alias))
    for number, weight in target.items():
        connection.execute(insert(table).values(adapter=name, alias=alias, number=number, weight=weight))
    record = {"old_target": to_json(old), "new_target": to_json(target), "moved_by": by, "moved_at": datetime.now(UTC)}
    connection.execute(insert(moves).values(adapter=name, alias=alias, how=how, undone=False, **record))
    of_alias = (moves.c.adapter == name, moves.c.alias == alias)
    kept = select(moves.c.id).where(*of_alias).order_by(moves.c.id.desc()).limit(MOVES_KEPT)
    connection.execute(delete(moves).where(*of_alias, moves.c.id.not_in(kept.scalar_subquery())))


def read_moves(connection: Connection, name: str, alias: str) -> list[tuple[int, Move]]:
    """With their row numbers, the latest first."""
    table = schema.alias_moves
    of_alias = select(table).where(table.c.adapter == name, table.c.alias == alias).order_by(table.c.id.desc())
    return [
        (
            row.id,
            Move(
                alias,
                from_json(row.old_target),
                from_json(row.new_target),
                row.how,
                row.moved_by,
                row.moved_at,
                row.undone,
            ),
        )
        for row in connection.execute(of_alias)
    ]


def mark_undone(connection: Connection, move_id: int) -> None:
    table = schema.alias_moves
    connection.execute(update(table).where(table.c.id == move_id).values(undone=True))


def delete_version(connection: Connection, name: str, number: int) -> None:
    """With the aliases that point to it alone; where others share it, they get its part."""
    for alias, target in read_targets(connection, name).items():
        if number in target:
            rest = {other: weight for other, weight in target.items() if other != number}
            move(connection, name, alias, rest, "delete")
    table = schema.versions
    connection.execute(delete(table).where(table.c.adapter == name, table.c.number == number))


def adapter_names(connection: Connection) -> list[str]:
    table = schema.adapters
    return list(connection.scalars(select(table.c.name).where(table.c.removed_at.is_(None)).order_by(table.c.name)))


def require_adapter(connection: Connection, name: str, *, lock: bool = False) -> Row[tuple[object, ...]]:
    table = schema.adapters
    query = select(table).where(table.c.name == name, table.c.removed_at.is_(None))
    spelled = names.NAME.fullmatch(name) is not None  # else the database driver itself may choke on it
    row = connection.execute(query.with_for_update() if lock else query).one_or_none() if spelled else None
    if row is None:
        known = adapter_names(connection)
        raise NotFound(f"there is no adapter {name[:140]!r}; registered: {listed(known)}")
    return row


def read_adapter(connection: Connection, name: str) -> Adapter:
    row = require_adapter(connection, name)._mapping
    return Adapter(
        name=row["name"],
        description=row["description"],
        created_at=row["created_at"],
        versions=read_versions(connection, name),
        targets=read_targets(connection, name),
    )


def read_versions(connection: Connection, name: str) -> tuple[Version, ...]:
    table = schema.versions
    rows = connection.execute(select(table).where(table.c.adapter == name).order_by(table.c.number)).mappings()
    return tuple(Version(**{**row, "manifest": Manifest.from_json(row["manifest"])}) for row in rows)


def read_targets(connection: Connection, name: str) -> dict[str, dict[int, int]]:
    table = schema.alias_targets
    query = select(table).where(table.c.adapter == name).order_by(table.c.alias, table.c.number)
    found: dict[str, dict[int, int]] = {}
    for row in connection.execute(query):
        found.setdefault(row.alias, {})[row.number] = row.weight
    return found


def require_version(connection: Connection, name: str, number: int) -> Version:
    adapter = read_adapter(connection, name)
    return only(adapter, str(number), [version for version in adapter.versions if version.number == number])
