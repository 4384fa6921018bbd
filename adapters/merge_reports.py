"""What was measured of a version when it was merged: the latest report of each, as a row, and it in a few figures.

Functions on a transaction that the caller holds. Knows no merge and no model.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, delete, insert, select

from adapters import schema

_table = schema.merge_reports


def write_report(
    connection: Connection, name: str, number: int, summary: Mapping[str, Any], report: Mapping[str, Any]
) -> None:
    delete_report(connection, name, number)
    values = {"adapter": name, "number": number, "summary": dict(summary), "report": dict(report)}
    connection.execute(insert(_table).values(**values, at=datetime.now(UTC)))


def read_report(connection: Connection, name: str, number: int) -> dict[str, Any] | None:
    """`at`, `summary`, `report`."""
    here = (_table.c.adapter == name, _table.c.number == number)
    row = connection.execute(select(_table.c.at, _table.c.summary, _table.c.report).where(*here)).mappings()
    found = row.one_or_none()
    return None if found is None else dict(found)


def read_summary(connection: Connection, name: str, number: int) -> dict[str, Any] | None:
    here = (_table.c.adapter == name, _table.c.number == number)
    found: dict[str, Any] | None = connection.scalar(select(_table.c.summary).where(*here))
    return found


def delete_report(connection: Connection, name: str, number: int) -> None:
    connection.execute(delete(_table).where(_table.c.adapter == name, _table.c.number == number))
