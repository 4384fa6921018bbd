"""`file://`: a directory or an archive of this machine, inside the directories that the operator named.

Links are followed only to what lies inside as well, and what was opened is checked, not what was looked at before.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote

from adapters.errors import SourceError, SourceNotFound, SourceRefused
from adapters.sources.address import Policy, Source
from adapters.sources.remote_file import Listing, RemoteFile, require_archive
from adapters.upload import KEPT


@contextmanager
def listing(source: Source, policy: Policy) -> Iterator[Listing]:
    roots = [Path(os.path.realpath(root)) for root in policy.directories()]
    path = Path(unquote(source.rest))
    if not path.is_absolute():
        raise SourceError(f"source {source.shown[:200]!r} names a host; a file of this machine is file:///directory")
    real = _inside(path, roots)
    if real.is_dir():
        names = sorted(name for name in KEPT if os.path.lexists(real / name))
        files = [_file(name, real / name, roots) for name in names]
    elif real.exists():
        files = [_file(require_archive(path.name), real, roots)]
    else:
        raise SourceNotFound(f"{source.shown[:200]!r} does not exist on the server's machine")
    yield Listing(tuple(files), {"url": source.shown})


def _file(name: str, path: Path, roots: Sequence[Path]) -> RemoteFile:
    return RemoteFile(name, _inside(path, roots).stat().st_size, lambda: _opened(path, roots))


@contextmanager
def _opened(path: Path, roots: Sequence[Path]) -> Iterator[BinaryIO]:
    # Without O_NONBLOCK opening a pipe would wait for whoever writes to it.
    descriptor = os.open(_inside(path, roots), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as file:
        _inside(Path(os.readlink(f"/proc/self/fd/{descriptor}")), roots)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise SourceRefused(f"{path.name!r} is a device, pipe or socket; expected a plain file")
        yield file


def _inside(path: Path, roots: Sequence[Path]) -> Path:
    """The path without links. Says the same of what is outside whether it exists or not."""
    real = Path(os.path.realpath(path))
    if not any(real.is_relative_to(root) for root in roots):
        raise SourceRefused(
            f"{str(path)[:200]!r} is not inside a directory that this server may read (source_roots), or a link leads "
            "out of it"
        )
    return real
