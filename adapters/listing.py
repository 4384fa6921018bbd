"""Which adapters, and which versions of one, a list is asked for: found by index, page by page, however many there are.

A query begins with the narrowest of the conditions, in the order of its index, so that a page costs the same among ten
as among thousands. What the names and numbers stand for is read by `rows.py`, but for overviews.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import ColumnElement, Connection, FromClause, and_, exists, func, select, true

from adapters import rows, schema, shadow_rows, tag_rows
from adapters.records import MERGE_ONLY, READY, Adapter, Overview
from adapters.tag_rows import OF_ADAPTER
from adapters.tags import Condition

NAME_END = "\x7f"
"""Behind every character that a name may have."""


@dataclass(frozen=True)
class Wanted:
    """Of adapters: all tags are there, each on the adapter or on any version of it, and one version is of this state,
    kind and base. Of versions: one that has all tags and is all of this. None stands for any."""

    name: str | None = None
    """As it is, or how it begins, with `*` behind: `pirate-*`."""
    tags: tuple[Condition, ...] = ()
    state: str | None = None
    kind: str | None = None
    base: str | None = None

    @property
    def of_version(self) -> bool:
        return (self.state, self.kind, self.base) != (None, None, None)


ALL = Wanted()


def list_adapters(connection: Connection, wanted: Wanted, after: str, limit: int | None) -> list[Adapter]:
    """With all their versions."""
    return rows.read_adapters(connection, _among(find_adapters(connection, wanted, after, limit), wanted))


def list_overviews(connection: Connection, wanted: Wanted, after: str, limit: int | None) -> list[Overview]:
    which = _among(find_adapters(connection, wanted, after, limit), wanted)
    return read_overviews(connection, which)


def list_served(connection: Connection, alias: str, name: str | None) -> list[Overview]:
    """Adapters (or the one of this name) of which the alias has a version to serve. One that is merge only has an
    engine, or had one when the alias moved there."""
    targets, versions = schema.alias_targets, schema.versions
    ready = and_(versions.c.number == targets.c.number, versions.c.state.in_((READY, MERGE_ONLY)))
    query = select(targets.c.adapter).join(versions, and_(versions.c.adapter == targets.c.adapter, ready))
    query = query.where(targets.c.alias == alias, true() if name is None else targets.c.adapter == name)
    served = set(connection.scalars(query))
    which: rows.Which = lambda column: true() if name is None else column == name  # noqa: E731
    return [each for each in read_overviews(connection, which) if each.name in served]


def list_versions(connection: Connection, name: str, wanted: Wanted, after: int, limit: int) -> Adapter:
    """The adapter with a page of its versions."""
    return rows.read_page(connection, name, find_versions(connection, name, wanted, after, limit))


def read_overviews(connection: Connection, which: rows.Which) -> list[Overview]:
    adapters, versions = schema.adapters, schema.versions
    found = connection.execute(select(adapters).where(which(adapters.c.name)).order_by(adapters.c.name)).all()
    count, last = func.count(), func.max(versions.c.number)
    grouped = select(versions.c.adapter, versions.c.state, count, last).group_by(versions.c.adapter, versions.c.state)
    counts: dict[str, dict[str, int]] = {}
    latest: dict[str, int] = {}
    for name, state, how_many, highest in connection.execute(grouped.where(which(versions.c.adapter))):
        counts.setdefault(name, {})[state] = how_many
        if state == READY:
            latest[name] = highest
    targets = rows.read_all_targets(connection, which(schema.alias_targets.c.adapter))
    shadows = shadow_rows.read_shadows(connection, which(schema.alias_shadows.c.adapter))
    own = and_(which(schema.tags.c.adapter), schema.tags.c.number == OF_ADAPTER)
    tagged = tag_rows.read_tagged(connection, own)
    return [
        Overview(
            each.name,
            each.description,
            each.created_at,
            counts.get(each.name, {}),
            latest.get(each.name),
            targets.get(each.name, {}),
            tagged.get(each.name, {}).get(OF_ADAPTER, {}),
            each.revision,
            shadows.get(each.name, {}),
        )
        for each in found
        if each.removed_at is None
    ]


def find_adapters(connection: Connection, wanted: Wanted, after: str, limit: int | None) -> list[str]:
    """The names behind `after`, in order."""
    first, rest = _narrowest(wanted.tags)
    if first is not None:
        name: ColumnElement[str] = schema.tags.c.adapter
        conditions = [_has(schema.tags, first)]
        conditions += [exists().where(other.c.adapter == name, _has(other, each)) for other, each in _others(rest)]
        if wanted.of_version:
            conditions.append(exists().where(schema.versions.c.adapter == name, _is(wanted)))
    elif wanted.of_version:
        name = schema.versions.c.adapter
        conditions = [_is(wanted)]
    else:
        name = schema.adapters.c.name
        conditions = [schema.adapters.c.removed_at.is_(None)]
    conditions.append(_named(connection, name, wanted.name, after))
    query = select(name).distinct().where(*conditions).order_by(name).limit(limit)
    return list(connection.scalars(query))


def find_versions(connection: Connection, adapter: str, wanted: Wanted, after: int, limit: int) -> list[int]:
    """The numbers above `after`, in order."""
    versions = schema.versions
    first, rest = _narrowest(wanted.tags)
    table: FromClause = versions if first is None else schema.tags
    number = table.c.number
    conditions = [table.c.adapter == adapter, number > after]
    if first is None:
        conditions.append(_is(wanted))
    else:
        conditions.append(_has(table, first))
        for other, each in _others(rest):
            conditions.append(exists().where(other.c.adapter == adapter, other.c.number == number, _has(other, each)))
        conditions.append(exists().where(versions.c.adapter == adapter, versions.c.number == number, _is(wanted)))
    return list(connection.scalars(select(number).where(*conditions).order_by(number).limit(limit)))


def _narrowest(tags: Sequence[Condition]) -> tuple[Condition | None, list[Condition]]:
    """A tag with its value says more than a key alone."""
    ordered = sorted(tags, key=lambda each: each[1] is None)
    return (ordered[0], ordered[1:]) if ordered else (None, [])


def _others(tags: Sequence[Condition]) -> list[tuple[FromClause, Condition]]:
    return [(schema.tags.alias(f"other_{place}"), each) for place, each in enumerate(tags)]


def _has(table: FromClause, tag: Condition) -> ColumnElement[bool]:
    key, value = tag
    return table.c.key == key if value is None else and_(table.c.key == key, table.c.value == value)


def _is(wanted: Wanted) -> ColumnElement[bool]:
    table = schema.versions
    given = ((table.c.state, wanted.state), (table.c.kind, wanted.kind), (table.c.base, wanted.base))
    return and_(true(), *(column == value for column, value in given if value is not None))


def _named(connection: Connection, name: ColumnElement[str], wanted: str | None, after: str) -> ColumnElement[bool]:
    if wanted is None:
        return name > after
    prefix = wanted.removesuffix("*")
    if prefix == wanted:
        return and_(name > after, name == wanted)
    begins = func.substr(name, 1, len(prefix)) == prefix
    if connection.dialect.name != "sqlite":  # names may be in the order of a language, in which a prefix is no range
        return and_(name > after, begins)
    first = name > after if after >= prefix else name >= prefix  # SQLite looks for one bound of two
    return and_(first, name < prefix + NAME_END, begins)


def _among(names: Sequence[str], wanted: Wanted) -> rows.Which:
    """Names that follow each other are a range, which no database counts the parameters of."""
    if wanted == ALL and names:
        return lambda column: column.between(names[0], names[-1])
    return lambda column: column.in_(names)
