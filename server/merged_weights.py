"""Where merged weights lie: a directory for each version, values of the base and type, and what crashes left of some.

It knows no job and no engine: who needs which of them is known elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

LEFT_BEHIND = re.compile(r"\.?(?P<key>[0-9a-f]{12}-[a-z]+-[a-z0-9]+)(\.merging)?")
GONE = ".gone-"


def key(params: Mapping[str, Any]) -> str:
    """The directory's name, of a job's parameters."""
    digest = str(params["digest"]).removeprefix("sha256:")[:12]
    return f"{digest}-{params['base']}-{params['dtype']}"


def key_of(path: Path) -> str | None:
    """The key of what lies here, also of a half; None: it is nobody's."""
    found = LEFT_BEHIND.fullmatch(path.name)
    return found["key"] if found else None


def put(made: Path, destination: Path) -> None:
    """Where the engine looks; there already where a stop came in between."""
    if not destination.exists():
        made.rename(destination)


def left(roots: Path, root: Path) -> list[Path]:
    """What lies in a server's directory `root`, and what an older release left beside it."""
    here = list(root.iterdir()) if root.exists() else []
    beside = list(roots.iterdir()) if roots.exists() else []
    return here + [path for path in beside if path.name.startswith(GONE) or key_of(path) is not None]


def aside(path: Path) -> Path:
    """Renamed as something that goes: whoever looks for it sees all of it, or nothing."""
    if path.name.startswith(GONE):
        return path
    gone = path.with_name(f"{GONE}{path.name}")
    with suppress(OSError):
        path.rename(gone)
    return gone
