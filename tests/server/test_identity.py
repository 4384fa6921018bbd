"""Which server this is: the same after a restart, another one beside it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from server.identity import Identity

HOLD = "import sys, pathlib, server.identity as i; me = i.Identity(pathlib.Path(sys.argv[1])); print(me.id); input()"


def identity(data_dir: Path) -> str:
    """Of a server that starts and ends."""
    made = Identity(data_dir)
    made.release()
    return made.id


def test_a_server_keeps_its_identity_and_another_has_its_own(tmp_path: Path) -> None:
    first = identity(tmp_path)
    assert identity(tmp_path) == first
    (tmp_path / "server-id").write_text("damaged")
    assert identity(tmp_path) != first
    (tmp_path / "other").mkdir()
    assert identity(tmp_path / "other") != identity(tmp_path)


def test_servers_that_share_a_directory_have_one_each(tmp_path: Path) -> None:
    first, second, third = (Identity(tmp_path) for _ in range(3))
    assert len({first.id, second.id, third.id}) == 3
    second.release()
    assert Identity(tmp_path).id == second.id


def test_one_that_was_killed_finds_its_own_again(tmp_path: Path) -> None:
    killed = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with killed:
        assert killed.stdout is not None
        its_own = killed.stdout.readline().strip()
        assert identity(tmp_path) != its_own
        killed.kill()
    assert identity(tmp_path) == its_own
