"""Which servers are on this registry, and when each was last heard of. It does not know what belongs to them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from sqlalchemy import delete, insert, select, update

from adapters import schema
from adapters.database import Database

_table = schema.servers


class Servers:
    """Safe to share between threads; several servers may open the same database."""

    def __init__(self, database: Database, server: str) -> None:
        self._database = database
        self.server = server

    def seen(self) -> None:
        """This one is up."""
        now = datetime.now(UTC)
        with self._database.write() as connection:  # nobody else writes this row
            here = update(_table).where(_table.c.id == self.server).values(seen_at=now)
            if not connection.execute(here).rowcount:
                connection.execute(insert(_table).values(id=self.server, seen_at=now))

    def lost(self, silent_s: float) -> list[str]:
        """Those that were not heard of for so long."""
        silent = (_table.c.id != self.server, _table.c.seen_at < datetime.now(UTC) - timedelta(seconds=silent_s))
        with self._database.read() as connection:
            return list(connection.scalars(select(_table.c.id).where(*silent).order_by(_table.c.id)))

    def forget(self, server: str) -> None:
        with self._database.write() as connection:
            connection.execute(delete(_table).where(_table.c.id == server))
