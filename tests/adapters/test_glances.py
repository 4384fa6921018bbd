"""A look sees what is committed, waits for nobody and holds nobody up; where it could not, there is none."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Select, bindparam, column, create_engine, select, table

from adapters.database import Database
from adapters.glances import Glances

VALUE: Select[Any] = select(column("value")).select_from(table("things")).where(column("name") == bindparam("name"))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A database with a write-ahead log, as every one that we have opened."""
    path = tmp_path / "things.db"
    with_log = sqlite3.connect(path)
    with_log.execute("PRAGMA journal_mode = WAL")
    fill(with_log)
    return path


@pytest.fixture
def database(file: Path) -> Iterator[Database]:
    database = Database(f"sqlite:///{file}")
    yield database
    database.close()


def fill(connection: sqlite3.Connection) -> None:
    with connection:
        connection.execute("CREATE TABLE things (name TEXT, value INTEGER)")
        connection.execute("INSERT INTO things VALUES ('one', 1)")
    connection.close()


def test_the_value_that_there_is(database: Database) -> None:
    assert database.glances.value(VALUE, name="one") == 1
    assert database.glances.value(VALUE, name="two") is None


def test_it_sees_what_another_process_commits_and_waits_for_no_writer(database: Database, file: Path) -> None:
    writer = sqlite3.connect(file, isolation_level=None)
    writer.execute("BEGIN IMMEDIATE")
    writer.execute("UPDATE things SET value = 2")
    assert database.glances.value(VALUE, name="one") == 1
    writer.execute("COMMIT")
    assert database.glances.value(VALUE, name="one") == 2
    writer.close()


def test_no_transaction_stays_open(database: Database, file: Path) -> None:
    assert database.glances.value(VALUE, name="one") == 1
    other = sqlite3.connect(file, isolation_level=None)
    other.execute("UPDATE things SET value = 2")
    busy, *_ = other.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    other.close()
    assert not busy


def test_where_the_database_refuses_there_is_no_look(database: Database, file: Path) -> None:
    """Whoever goes to a thread instead waits there, or is told what is wrong."""
    assert database.glances.value(VALUE, name="one") == 1
    other = sqlite3.connect(file)
    other.execute("DROP TABLE things")
    other.close()
    assert database.glances.value(VALUE, name="one") is None


def test_it_is_opened_again_after_it_was_closed(database: Database) -> None:
    assert database.glances.value(VALUE, name="one") == 1
    database.close()
    assert database.glances.value(VALUE, name="one") == 1


def test_where_readers_are_locked_out_there_is_no_look(tmp_path: Path) -> None:
    path = tmp_path / "locked.db"
    fill(sqlite3.connect(path))
    engine = create_engine(f"sqlite:///{path}")
    glances = Glances(engine)
    assert glances.value(VALUE, name="one") is None
    glances.close()
    engine.dispose()


def test_in_memory_there_is_no_look() -> None:
    engine = create_engine("sqlite://")
    assert Glances(engine).value(VALUE, name="one") is None
    engine.dispose()
