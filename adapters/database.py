"""One SQL database: opens it with safe settings and hands out transactions. Knows no tables."""

from __future__ import annotations

import fcntl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, create_engine, event, text
from sqlalchemy.exc import ArgumentError, DBAPIError

from adapters.errors import Conflict, StoreError
from adapters.glances import Glances

BUSY_TIMEOUT_MS = 10_000
IMMEDIATE = "loraplex_begin_immediate"
ADVISORY_LOCK = 0x6C6F7261706C6578
"""`loraplex` in ASCII: one number for all who open the same database."""


class Database:
    """Safe to share between threads."""

    def __init__(self, url: str) -> None:
        try:
            self._engine = create_engine(url, pool_pre_ping=not url.startswith("sqlite"))
        except (ArgumentError, ImportError) as error:  # the URL itself is not shown: it may hold a password
            raise StoreError(
                f"the database URL cannot be used: {error}; expected sqlite:///FILE or postgresql+psycopg://..., "
                "and the driver it names installed"
            ) from error
        self._turn = threading.Lock()
        self.glances = Glances(self._engine)
        if self._engine.dialect.name == "sqlite":
            event.listen(self._engine, "connect", _configure_sqlite)
            event.listen(self._engine, "begin", _begin_sqlite)

    @property
    def shown_url(self) -> str:
        return self._engine.url.render_as_string(hide_password=True)

    @contextmanager
    def read(self) -> Iterator[Connection]:
        with self._engine.begin() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """Commits at the end of the block, rolls back when it raises."""
        with self._engine.execution_options(**{IMMEDIATE: True}).begin() as connection:
            yield connection

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Of all threads, processes and machines that open this database, one at a time. Not reentrant.

        It ends with its holder, however that dies. Those who wait hold one connection a process, not all of them.
        """
        with self._turn:
            if self._engine.dialect.name == "postgresql":
                with self._engine.begin() as connection:
                    connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": ADVISORY_LOCK})
                    yield
            elif (file := self._engine.url.database) not in (None, "", ":memory:"):
                with Path(f"{file}.lock").open("wb") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX)
                    yield
            else:
                yield

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Held by every server while it is up. Waits while somebody is inside `unserved`."""
        with self._presence(fcntl.LOCK_SH, "SELECT pg_advisory_lock_shared(:key)"):
            yield

    @contextmanager
    def unserved(self) -> Iterator[None]:
        """While this block runs, no server is up and none starts. Conflict where one is, on whatever machine."""
        with self._presence(fcntl.LOCK_EX | fcntl.LOCK_NB, "SELECT pg_try_advisory_lock(:key)") as held:
            if not held:
                raise Conflict(
                    "a server is up on this registry, and may be using what would be deleted; ask it instead "
                    "(--server URL), or stop it first",
                    code="server_running",
                )
            yield

    @contextmanager
    def _presence(self, flock: int, statement: str) -> Iterator[bool]:
        """Whether it was had. It ends with its holder, however that dies; PostgreSQL's also with the connection."""
        if self._engine.dialect.name == "postgresql":
            options = {"isolation_level": "AUTOCOMMIT"}  # no transaction stands open for as long as a server is up
            with self._engine.connect().execution_options(**options) as connection:
                try:
                    yield connection.execute(text(statement), {"key": ADVISORY_LOCK + 1}).scalar() is not False
                finally:
                    with suppress(DBAPIError):  # the server notices a moment later that a connection was closed
                        connection.execute(text("SELECT pg_advisory_unlock_all()"))
                    connection.invalidate()  # back in the pool it might hold the lock for ever
        elif (file := self._engine.url.database) not in (None, "", ":memory:"):
            with Path(f"{file}.served").open("ab") as lock:
                try:
                    fcntl.flock(lock, flock)
                except BlockingIOError:
                    yield False
                else:
                    yield True
        else:
            yield True

    def close(self) -> None:
        self.glances.close()
        self._engine.dispose()


def _configure_sqlite(connection: Any, _: Any) -> None:
    connection.isolation_level = None  # the driver must not begin transactions by itself
    for setting in (
        f"busy_timeout = {BUSY_TIMEOUT_MS}",
        "journal_mode = WAL",
        "synchronous = FULL",
        "foreign_keys = ON",
    ):
        connection.execute(f"PRAGMA {setting}")


def _begin_sqlite(connection: Connection) -> None:
    """A writer takes its lock at once: upgrading a read lock later can fail without waiting."""
    immediate = connection.get_execution_options().get(IMMEDIATE, False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")
