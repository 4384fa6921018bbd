"""The rows of shadows, read and written inside a transaction that the caller holds. Knows no rules."""

from __future__ import annotations

from sqlalchemy import ColumnElement, Connection, delete, insert, select

from adapters import schema
from adapters.records import Shadow

TABLE = schema.alias_shadows
Shadows = dict[str, Shadow]
"""Alias → its shadow."""


def read_shadows(connection: Connection, which: ColumnElement[bool]) -> dict[str, Shadows]:
    """Adapter → its shadows."""
    found: dict[str, Shadows] = {}
    for row in connection.execute(select(TABLE).where(which).order_by(TABLE.c.adapter, TABLE.c.alias)):
        found.setdefault(row.adapter, {})[row.alias] = Shadow(row.number, row.percent)
    return found


def shadows_of(connection: Connection, name: str) -> Shadows:
    return read_shadows(connection, TABLE.c.adapter == name).get(name, {})


def write_shadow(connection: Connection, name: str, alias: str, shadow: Shadow | None) -> None:
    connection.execute(delete(TABLE).where(TABLE.c.adapter == name, TABLE.c.alias == alias))
    if shadow is not None:
        values = {"number": shadow.number, "percent": shadow.percent}
        connection.execute(insert(TABLE).values(adapter=name, alias=alias, **values))


def delete_shadows(connection: Connection, name: str, number: int) -> None:
    """All that this version is."""
    connection.execute(delete(TABLE).where(TABLE.c.adapter == name, TABLE.c.number == number))


def forget_useless(connection: Connection, name: str, alias: str, target: set[int]) -> None:
    """An alias that is gone has no shadow; one that points to its shadow alone would compare it with itself."""
    here = (TABLE.c.adapter == name, TABLE.c.alias == alias)
    if not target:
        connection.execute(delete(TABLE).where(*here))
    elif len(target) == 1:
        connection.execute(delete(TABLE).where(*here, TABLE.c.number.in_(target)))
