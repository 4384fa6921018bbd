"""The rows of tags, read and written inside a transaction that the caller holds. Knows no bounds."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import ColumnElement, Connection, delete, insert, select

from adapters import schema
from adapters.tags import Changes

OF_ADAPTER = 0
"""In the place of a version's number."""
Tagged = dict[int, dict[str, str]]
"""Version number, or OF_ADAPTER → its tags. Who has none is not there."""

TABLE = schema.tags


def read_tags(connection: Connection, name: str, numbers: Sequence[int] | None = None) -> Tagged:
    """Of an adapter and all its versions, or of some of these."""
    which = TABLE.c.adapter == name
    return read_tagged(connection, which if numbers is None else which & TABLE.c.number.in_(numbers)).get(name, {})


def read_tagged(connection: Connection, which: ColumnElement[bool]) -> dict[str, Tagged]:
    """Adapter → what is tagged of it."""
    found: dict[str, Tagged] = {}
    for row in connection.execute(select(TABLE).where(which).order_by(TABLE.c.adapter, TABLE.c.number, TABLE.c.key)):
        found.setdefault(row.adapter, {}).setdefault(row.number, {})[row.key] = row.value
    return found


def write_tags(connection: Connection, name: str, number: int, changes: Changes) -> None:
    here = (TABLE.c.adapter == name, TABLE.c.number == number)
    connection.execute(delete(TABLE).where(*here, TABLE.c.key.in_(changes)))
    for key, value in changes.items():
        if value is not None:
            connection.execute(insert(TABLE).values(adapter=name, number=number, key=key, value=value))


def delete_tags(connection: Connection, name: str, number: int) -> None:
    connection.execute(delete(TABLE).where(TABLE.c.adapter == name, TABLE.c.number == number))
