"""One value out of a SQLite database, for an event loop: microseconds, on a connection that is held for it.

Every look is a transaction of its own, so it sees whatever any process has committed. Where a reader may have to wait
for somebody (another database, a journal that locks readers out) nothing is seen, and whoever looks goes to a thread
instead. Knows no tables.
"""

from __future__ import annotations

import threading
from functools import cache
from sqlite3 import OperationalError
from typing import Any

from sqlalchemy import Engine, Select
from sqlalchemy.dialects import sqlite

NAMED = sqlite.dialect(paramstyle="named")


class Glances:
    """Safe to share between threads. Opened by the first look."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._turn = threading.Lock()
        self._is_open = False
        self._connection: Any = None

    def value(self, statement: Select[Any], **parameters: Any) -> Any:
        """The first column of the first row. None where there is none, or where a look may take longer."""
        with self._turn:
            if not self._is_open:
                self._connection, self._is_open = _held(self._engine), True
            if self._connection is None:
                return None
            try:
                found = self._connection.execute(_sql(statement), parameters)
                rows = found.fetchall()  # all: or the transaction stays open
            except OperationalError:  # a thread may wait, or learn what is wrong
                return None
        return rows[0][0] if rows else None

    def close(self) -> None:
        with self._turn:
            if self._connection is not None:
                self._connection.close()
            self._connection, self._is_open = None, False


def _held(engine: Engine) -> Any:
    """The driver's own connection, out of the pool: SQLAlchemy's would begin a transaction and keep it."""
    if engine.dialect.name != "sqlite" or engine.url.database in (None, "", ":memory:"):
        return None
    lent = engine.raw_connection()
    held: Any = lent.driver_connection
    lent.detach()
    held.execute("PRAGMA busy_timeout = 0")  # whoever else waits meanwhile is every request
    if held.execute("PRAGMA journal_mode").fetchall() == [("wal",)]:
        return held
    held.close()
    return None


@cache
def _sql(statement: Select[Any]) -> str:
    return str(statement.compile(dialect=NAMED))
