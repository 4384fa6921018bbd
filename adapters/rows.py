"""The registry's rows, read and written inside a transaction that the caller holds. Knows no rules about aliases."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from datetime import UTC, datetime

from sqlalchemy import (
    ColumnElement,
    Connection,
    RowMapping,
    and_,
    bindparam,
    delete,
    false,
    func,
    insert,
    select,
    update,
)

from adapters import merge_reports, names, schema, shadow_rows, tag_rows
from adapters.errors import NotFound
from adapters.manifest import Manifest
from adapters.records import MERGE_ONLY, READY, Adapter, Move, Shadow, Version
from adapters.references import SHOWN, listed, only
from adapters.tag_rows import OF_ADAPTER, Tagged
from adapters.targets import Target, from_json, to_json

Which = Callable[[ColumnElement[str]], ColumnElement[bool]]
"""Of a column with adapters' names: those that are meant."""
MOVES_KEPT = 100
"""Of an alias; older ones are forgotten."""
RECORD = [schema.versions.c[each.name] for each in fields(Version)]
"""The columns that a record shows; others are for looking."""
REVISION = select(schema.adapters.c.revision).where(
    schema.adapters.c.name == bindparam("name"), schema.adapters.c.removed_at.is_(None)
)
"""Of the adapter `name`."""


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


def touch(connection: Connection, name: str) -> None:
    """Every change of an adapter is counted."""
    table = schema.adapters
    connection.execute(update(table).where(table.c.name == name).values(revision=table.c.revision + 1))


def describe(connection: Connection, name: str, description: str | None) -> None:
    table = schema.adapters
    connection.execute(update(table).where(table.c.name == name).values(description=description))


def bury(connection: Connection, name: str) -> None:
    tag_rows.delete_tags(connection, name, OF_ADAPTER)
    table = schema.adapters
    connection.execute(update(table).where(table.c.name == name).values(removed_at=datetime.now(UTC)))


def insert_version(connection: Connection, name: str, number: int, manifest: Manifest) -> int:
    connection.execute(
        insert(schema.versions).values(
            adapter=name,
            number=number,
            digest=manifest.digest,
            state=READY if manifest.merge_only is None else MERGE_ONLY,
            reason=manifest.merge_only,
            created_at=datetime.now(UTC),
            manifest=manifest.to_json(),
            kind=manifest.kind[:32],
            base=manifest.base_model[:256],
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
    shadow_rows.forget_useless(connection, name, alias, set(target))
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


def set_state(connection: Connection, name: str, number: int, state: str, reason: str | None = None) -> None:
    table = schema.versions
    where = (table.c.adapter == name, table.c.number == number)
    connection.execute(update(table).where(*where).values(state=state, reason=reason))


def mark_undone(connection: Connection, move_id: int) -> None:
    table = schema.alias_moves
    connection.execute(update(table).where(table.c.id == move_id).values(undone=True))


def delete_version(connection: Connection, name: str, number: int) -> None:
    """With the aliases that point to it alone; where others share it, they get its part."""
    for alias, target in read_targets(connection, name).items():
        if number in target:
            rest = {other: weight for other, weight in target.items() if other != number}
            move(connection, name, alias, rest, "delete")
    tag_rows.delete_tags(connection, name, number)
    shadow_rows.delete_shadows(connection, name, number)
    merge_reports.delete_report(connection, name, number)
    table = schema.versions
    connection.execute(delete(table).where(table.c.adapter == name, table.c.number == number))


def set_manifest(connection: Connection, name: str, number: int, manifest: Manifest) -> None:
    table = schema.versions
    here = (table.c.adapter == name, table.c.number == number)
    connection.execute(update(table).where(*here).values(manifest=manifest.to_json()))


def require_adapter(connection: Connection, name: str, *, lock: bool = False) -> RowMapping:
    table = schema.adapters
    query = select(table).where(table.c.name == name, table.c.removed_at.is_(None))
    spelled = names.NAME.fullmatch(name) is not None  # else the database driver itself may choke on it
    row = connection.execute(query.with_for_update() if lock else query).mappings().one_or_none() if spelled else None
    if row is None:
        raise NotFound(f"there is no adapter {name[:140]!r}; registered: {_some_names(connection)}")
    return row


def read_adapter(connection: Connection, name: str) -> Adapter:
    row, versions = require_adapter(connection, name), read_versions(connection, name)
    targets, tagged = read_targets(connection, name), tag_rows.read_tags(connection, name)
    return _adapter(row, versions, targets, tagged, shadow_rows.shadows_of(connection, name))


def read_meant(connection: Connection, name: str, ref: str) -> Adapter:
    """The adapter with no more of its versions and aliases than `ref` can mean, however many it has."""
    table, targets = schema.versions, schema.alias_targets
    row = require_adapter(connection, name)
    if names.NUMBER.fullmatch(ref):
        meant: ColumnElement[bool] = table.c.number == int(ref)
    elif names.DIGEST_PREFIX.fullmatch(ref):
        meant = table.c.digest.startswith(ref)
    elif ref == names.LATEST:
        ready = select(func.max(table.c.number)).where(table.c.adapter == name, table.c.state == READY)
        meant = table.c.number == ready.scalar_subquery()
    elif names.NAME.fullmatch(ref):
        of_alias = select(targets.c.number).where(targets.c.adapter == name, targets.c.alias == ref)
        found = read_targets(connection, name, targets.c.alias == ref)
        return _adapter(row, read_versions(connection, name, table.c.number.in_(of_alias)), found)
    else:
        meant = false()
    return _adapter(row, read_versions(connection, name, meant), {})


def read_adapters(connection: Connection, which: Which) -> list[Adapter]:
    """In the order of their names. Four queries, however many there are."""
    table = schema.adapters
    rows = connection.execute(select(table).where(which(table.c.name)).order_by(table.c.name)).mappings().all()
    versions: dict[str, list[Version]] = {}
    for version in _versions(connection, which(schema.versions.c.adapter)):
        versions.setdefault(version.adapter, []).append(version)
    targets = read_all_targets(connection, which(schema.alias_targets.c.adapter))
    tagged = tag_rows.read_tagged(connection, which(schema.tags.c.adapter))
    shadows = shadow_rows.read_shadows(connection, which(schema.alias_shadows.c.adapter))
    return [
        _adapter(row, versions.get(name, ()), targets.get(name, {}), tagged.get(name), shadows.get(name))
        for row in rows
        if row["removed_at"] is None and (name := row["name"])
    ]


def read_page(connection: Connection, name: str, numbers: Sequence[int]) -> Adapter:
    """The adapter with these of its versions, and all its aliases."""
    row = require_adapter(connection, name)
    versions = read_versions(connection, name, schema.versions.c.number.in_(numbers))
    targets, tagged = read_targets(connection, name), tag_rows.read_tags(connection, name, numbers)
    return _adapter(row, versions, targets, tagged, shadow_rows.shadows_of(connection, name))


def read_versions(connection: Connection, name: str, which: ColumnElement[bool] | None = None) -> list[Version]:
    here = schema.versions.c.adapter == name
    return _versions(connection, here if which is None else and_(here, which))


def read_same(connection: Connection, name: str, digest: str) -> list[Version]:
    """Versions of these bytes. By the digest alone, or SQLite looks through all versions of the name."""
    return [each for each in _versions(connection, schema.versions.c.digest == digest) if each.adapter == name]


def has_versions(connection: Connection, name: str) -> bool:
    return (
        connection.scalar(select(schema.versions.c.number).where(schema.versions.c.adapter == name).limit(1))
        is not None
    )


def read_state(connection: Connection, state: str) -> list[Version]:
    return _versions(connection, schema.versions.c.state == state)


def read_targets(
    connection: Connection, name: str, which: ColumnElement[bool] | None = None
) -> dict[str, dict[int, int]]:
    here = schema.alias_targets.c.adapter == name
    return read_all_targets(connection, here if which is None else and_(here, which)).get(name, {})


def find_ref(connection: Connection, parent: str) -> str | None:
    """`name@number` of the version here that a lineage's parent means, if there is one."""
    table = schema.versions
    name, _, number = parent.partition("@")
    meant = and_(table.c.adapter == name, table.c.number == int(number)) if number else table.c.digest == parent
    found = connection.execute(select(table.c.adapter, table.c.number).where(meant).limit(1)).one_or_none()
    return None if found is None else f"{found.adapter}@{found.number}"


def _adapter(
    row: RowMapping,
    versions: Sequence[Version],
    targets: Mapping[str, Target],
    tagged: Tagged | None = None,
    shadows: Mapping[str, Shadow] | None = None,
) -> Adapter:
    return Adapter(
        row["name"],
        row["description"],
        row["created_at"],
        tuple(versions),
        targets,
        tagged or {},
        row["revision"],
        shadows or {},
    )


def _versions(connection: Connection, which: ColumnElement[bool]) -> list[Version]:
    table = schema.versions
    rows = connection.execute(select(*RECORD).where(which).order_by(table.c.adapter, table.c.number)).mappings()
    return [Version(**{**row, "manifest": Manifest.from_json(row["manifest"])}) for row in rows]


def read_all_targets(connection: Connection, which: ColumnElement[bool]) -> dict[str, dict[str, dict[int, int]]]:
    """Adapter → alias → where it points."""
    table = schema.alias_targets
    query = select(table).where(which).order_by(table.c.adapter, table.c.alias, table.c.number)
    found: dict[str, dict[str, dict[int, int]]] = {}
    for row in connection.execute(query):
        found.setdefault(row.adapter, {}).setdefault(row.alias, {})[row.number] = row.weight
    return found


def _some_names(connection: Connection) -> str:
    table = schema.adapters
    living = table.c.removed_at.is_(None)
    first = connection.scalars(select(table.c.name).where(living).order_by(table.c.name).limit(SHOWN))
    return listed(list(first), connection.scalar(select(func.count()).select_from(table).where(living)))


def require_version(connection: Connection, name: str, number: int) -> Version:
    found = read_versions(connection, name, schema.versions.c.number == number)
    return found[0] if found else only(read_adapter(connection, name), str(number), [])
