"""The registry's tables, in portable types, and the row that says which schema a database has.

It knows how to make and recognise the schema, not what the rows mean.
"""

from __future__ import annotations

import uuid
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    Column,
    Connection,
    DateTime,
    Dialect,
    ForeignKey,
    ForeignKeyConstraint,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
    insert,
    inspect,
    select,
)

from adapters.errors import StoreError

SCHEMA_VERSION = 1


class UtcDateTime(TypeDecorator[datetime]):
    """SQLite forgets time zones, so times are stored in UTC without one and come back with it."""

    impl = DateTime
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return None if value is None else value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: Any, dialect: Dialect) -> datetime | None:
        return None if value is None else value.replace(tzinfo=UTC)


metadata = MetaData()

schema_version = Table(
    "loraplex_schema",
    metadata,
    Column("version", Integer, primary_key=True, autoincrement=False),
    # Which registry this is: the blob store remembers it, so that no other registry sweeps its blobs away.
    Column("identity", String(32), nullable=False),
)

adapters = Table(
    "adapters",
    metadata,
    Column("name", String(128), primary_key=True),
    Column("description", Text),
    Column("created_at", UtcDateTime, nullable=False),
    # The row outlives the adapter: a number that was given out is never given out again.
    Column("last_number", Integer, nullable=False),
    Column("removed_at", UtcDateTime),
)

versions = Table(
    "adapter_versions",
    metadata,
    Column("adapter", String(128), ForeignKey("adapters.name"), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("digest", String(71), nullable=False, index=True),
    Column("state", String(16), nullable=False),
    Column("reason", Text),
    Column("created_at", UtcDateTime, nullable=False),
    Column("manifest", JSON, nullable=False),
)

aliases = Table(
    "adapter_aliases",
    metadata,
    Column("adapter", String(128), primary_key=True),
    Column("alias", String(128), primary_key=True),
    Column("number", Integer, nullable=False),
    ForeignKeyConstraint(["adapter", "number"], ["adapter_versions.adapter", "adapter_versions.number"]),
)


def prepare(connection: Connection) -> None:
    """Make the tables in an empty database, or refuse a database of another schema."""
    if not inspect(connection).has_table(schema_version.name):
        metadata.create_all(connection)
        connection.execute(insert(schema_version).values(version=SCHEMA_VERSION, identity=uuid.uuid4().hex))
    found = connection.scalar(select(schema_version.c.version))
    if found != SCHEMA_VERSION:
        raise StoreError(
            f"the registry database has schema {found}, this loraplex knows {SCHEMA_VERSION}; "
            "start the loraplex release that wrote it, or point the registry at another database",
            code="schema_mismatch",
        )
