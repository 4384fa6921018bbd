"""kill -9 at instants spread over everything that changes a registry and its store: uploads, aliases, deletions,
garbage collection, and the starts in between. What was acknowledged is there, what was not is there wholly or not at
all.

tests/adapters/test_crash.py goes through every single step of one upload and one deletion; tests/flows/test_crash.py
kills a server.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.adapters.factories import write_base

REPOSITORY = Path(__file__).parents[2]


def live(root: Path, seed: int, instants: int, *place: str) -> dict[str, int]:
    """What was met on the way."""
    (root / "work").mkdir()
    arguments = [str(write_base(root / "tiny")), str(root / "work"), str(seed), str(instants), *place]
    done = subprocess.run(
        [sys.executable, "-m", "tests.adapters.crash_story", *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    met: dict[str, int] = json.loads(done.stdout)
    assert sum(count for what, count in met.items() if what.startswith("in ")) == instants
    return met


def test_fifty_kills_on_a_disk_and_sqlite(tmp_path: Path) -> None:
    met = live(tmp_path, 1, 50)
    assert {"in upload", "in promote", "in delete", "in collect"} <= met.keys()
    assert sum(what.startswith("at ") for what in met) > 8
    assert met["done all the same"] > 0
    assert met["not done"] > 10


def test_kills_on_postgresql(tmp_path: Path, postgres: Callable[[], str]) -> None:
    met = live(tmp_path, 2, 8, postgres())
    assert met["not done"] > 2


def test_kills_on_an_object_store(tmp_path: Path, s3: Callable[[], str]) -> None:
    met = live(tmp_path, 3, 8, "", s3())
    assert met["at s3"] > 2
