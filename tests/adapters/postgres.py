"""A PostgreSQL server of our own, from Debian's package, that lives as long as the test session."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

START_TIMEOUT_S = "60"


@contextmanager
def running() -> Iterator[Callable[[], str]]:
    """Gives a function that makes a fresh database and returns its URL. Skips where the package is not installed."""
    programs = _programs()
    if programs is None:
        pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    user = "postgres" if os.geteuid() == 0 else None  # it refuses to run as root
    root = Path(tempfile.mkdtemp(prefix="pg-"))
    if user is not None:
        shutil.chown(root, user)

    def run(program: str, *arguments: str) -> None:
        subprocess.run([programs / program, *arguments], user=user, cwd=root, check=True, stdout=subprocess.DEVNULL)

    cluster, options = str(root / "cluster"), f"-c listen_addresses= -c unix_socket_directories={root} -c fsync=off"
    try:
        run("initdb", "--pgdata", cluster, "--username", "postgres", "--auth", "trust", "--no-sync")
        run("pg_ctl", "start", "-w", "-t", START_TIMEOUT_S, "-D", cluster, "-l", str(root / "log"), "-o", options)
        try:
            yield lambda: _fresh_database(root)
        finally:
            run("pg_ctl", "stop", "-w", "-D", cluster, "-m", "immediate")
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _fresh_database(socket: Path) -> str:
    import psycopg

    name = f"t{uuid.uuid4().hex}"
    with psycopg.connect(host=str(socket), user="postgres", dbname="postgres", autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return f"postgresql+psycopg://postgres@/{name}?host={socket}"


def _programs() -> Path | None:
    """Debian keeps them off the path."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    on_path = shutil.which("initdb")
    return found[-1].parent if found else Path(on_path).resolve().parent if on_path else None
