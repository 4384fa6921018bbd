"""The registry's schema, step by step, with Alembic: an empty database and one of any older release become today's.

A step is a file in `versions/`; `schema.py` says what all of them together must lead to, and a test compares the two.
Everything happens in the caller's transaction, so a step that fails leaves the database as it was.
"""

from __future__ import annotations

import logging
from pathlib import Path

from sqlalchemy import Connection, inspect, text

from adapters import schema
from adapters.errors import StoreError

LOCK = 0x6C6F7261  # "lora": one process migrates, others wait for it (PostgreSQL; SQLite has one writer anyway)
VERSION_TABLE = "alembic_version"


def upgrade(connection: Connection) -> None:
    """Raises StoreError when a newer release wrote the database."""
    if connection.dialect.name == "postgresql":
        connection.execute(text(f"SELECT pg_advisory_xact_lock({LOCK})"))
    if current(connection) != schema.REVISION:
        _upgrade(connection)


def current(connection: Connection) -> str | None:
    """The last step that was taken; None in an empty database. The first release had tables, but no steps."""
    tables = inspect(connection)
    if tables.has_table(VERSION_TABLE):
        found: str | None = connection.scalar(text(f"SELECT version_num FROM {VERSION_TABLE}"))
        return found
    return "1" if tables.has_table(schema.identity.name) else None


def _upgrade(connection: Connection) -> None:
    from alembic import command
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    logging.getLogger("alembic").setLevel(logging.WARNING)
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    known = [step.revision for step in ScriptDirectory.from_config(config).walk_revisions()]
    found = current(connection)
    if found is not None and found not in known:
        raise StoreError(
            f"the registry database has schema {found}, this loraplex knows {schema.REVISION} and older ones; "
            "start the loraplex release that wrote it, or point the registry at another database",
            code="schema_mismatch",
        )
    if found is not None and not inspect(connection).has_table(VERSION_TABLE):
        command.stamp(config, found)
    command.upgrade(config, "head")
