"""A version between upload and service: what is to be done when the engine's probe passes, kept with its row.

Functions on a transaction that the caller holds with the adapter's row locked. Knows no engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection, update

from adapters import names, rows, schema
from adapters.records import CHECKING, FAILED, READY, Version


def begin(connection: Connection, version: Version, *, promote: bool, by: str | None) -> None:
    """Also for one that failed and whose bytes came again: it is tried once more."""
    pending = version.pending or {"attempts": 0}
    pending = {**pending, "promote": bool(promote or pending.get("promote")), "by": by or pending.get("by")}
    _write(connection, version, state=CHECKING, reason=None, pending=pending)


def count_attempt(connection: Connection, version: Version, change: int) -> int:
    """How often it was tried, this time included; written before, so that one that takes the server down is counted."""
    pending = dict(version.pending or {})
    pending["attempts"] = int(pending.get("attempts", 0)) + change
    _write(connection, version, pending=pending)
    return int(pending["attempts"])


def admit(connection: Connection, version: Version, findings: Mapping[str, Any]) -> bool:
    """To `ready`, and the default alias to it where that was asked for. Not if it left `checking` meanwhile."""
    if version.state != CHECKING:
        return False
    _write(connection, version, state=READY, probe=dict(findings), pending=None)
    pending = version.pending or {}
    current = rows.read_targets(connection, version.adapter).get(names.DEFAULT, {})
    overtaken = bool(current) and max(current) > version.number  # a later upload was tried sooner
    if (pending.get("promote") and not overtaken) or not current:
        target = {version.number: 1}
        rows.move(connection, version.adapter, names.DEFAULT, target, "upload", by=pending.get("by"))
    return True


def reject(connection: Connection, version: Version, reason: str) -> bool:
    if version.state != CHECKING:
        return False
    _write(connection, version, state=FAILED, reason=reason, pending=None)
    return True


def _write(connection: Connection, version: Version, **values: Any) -> None:
    table = schema.versions
    here = (table.c.adapter == version.adapter, table.c.number == version.number)
    connection.execute(update(table).where(*here).values(values))
