"""Numbers the moments at which a process changes disk, database or bucket, so that it can be killed at the n-th: the
same one in every run.

Python's own audit events tell of files and locks; commits, statements, flushes and calls of S3 are wrapped. What is
installed stays until the process ends.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Awaitable, Callable
from functools import wraps
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, event
from sqlalchemy.engine.default import DefaultDialect

OF_FILES = (
    "open",
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.chmod",
    "shutil.rmtree",
    "os.link",
    "os.truncate",
)
LOCKS = ("fcntl.flock",)
CHANGING = ("insert", "update", "delete", "create")


class Instants:
    """`count` moments have passed; `at` is called at each of them with its number and what it is."""

    def __init__(self, root: Path, at: Callable[[int, str], None] = lambda number, what: None) -> None:
        self._root = str(root)
        self._at = at
        self._changed = False
        self.count = 0

    def install(self) -> None:
        sys.addaudithook(self._audit)
        os.fsync = self._around("fsync", os.fsync)
        DefaultDialect.do_commit = self._around_commit(DefaultDialect.do_commit)  # type: ignore[method-assign]
        event.listen(Engine, "before_cursor_execute", self._statement)
        if "s3fs" in sys.modules:
            import s3fs

            s3fs.S3FileSystem._call_s3 = self._around_async("s3", s3fs.S3FileSystem._call_s3)

    def reach(self, what: str) -> None:
        self.count += 1
        self._at(self.count, what)

    def _audit(self, name: str, arguments: tuple[Any, ...]) -> None:
        changes = name in OF_FILES and str(arguments[0]).startswith(self._root)
        if name == "open":
            changes = changes and bool(int(arguments[2]) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        if name in LOCKS or changes:
            self.reach(name)

    def _statement(self, *arguments: Any) -> None:
        verb = str(arguments[2]).split(maxsplit=1)[0].lower()
        if verb in CHANGING:
            self._changed = True
            self.reach(verb)

    def _around_commit(self, commit: Callable[..., None]) -> Callable[..., None]:
        """Reading ends with a commit as well, which changes nothing."""
        around = self._around("commit", commit)

        @wraps(commit)
        def wrapper(*arguments: Any) -> None:
            (around if self._changed else commit)(*arguments)
            self._changed = False

        return wrapper

    def _around(self, what: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        def wrapper(*arguments: Any, **named: Any) -> Any:
            self.reach(f"before {what}")
            result = call(*arguments, **named)
            self.reach(f"after {what}")
            return result

        return wrapper

    def _around_async(self, what: str, call: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        @wraps(call)
        async def wrapper(*arguments: Any, **named: Any) -> Any:
            self.reach(f"before {what}")
            result = await call(*arguments, **named)
            self.reach(f"after {what}")
            return result

        return wrapper
