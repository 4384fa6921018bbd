"""Which of the servers on a shared registry this is: a few digits that lie in its data directory."""

from __future__ import annotations

import re
import secrets
from contextlib import suppress
from pathlib import Path

FILE = "server-id"


def server_identity(data_dir: Path) -> str:
    """12 hex digits, made at the first start."""
    path = data_dir / FILE
    with suppress(FileNotFoundError):
        known = path.read_text(encoding="ascii", errors="replace").strip()
        if re.fullmatch("[0-9a-f]{12}", known):
            return known
    made = secrets.token_hex(6)
    part = path.with_suffix(".part")
    part.write_text(made, encoding="ascii")
    part.rename(path)
    return made
