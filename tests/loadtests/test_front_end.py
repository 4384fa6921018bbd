"""Waves against a server that answers at once, and the table of figures known by hand."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from loadtests.front_end import Waited, _print, ask
from server.launch import launch
from tests.adapters.factories import write_base


def test_every_client_of_every_wave_hears_its_first_event_before_the_wave_ends(tmp_path: Path) -> None:
    flags = ["--engine", "fake", "--model", str(write_base(tmp_path / "tiny")), "--data-dir", str(tmp_path / "data")]
    with launch(flags, tmp_path / "server.log") as server:
        server.wait_ready()
        found = asyncio.run(ask(server.url, ("tiny", ""), clients=3, waves=2))
        assert list(found) == ["tiny", ""]
        for waited in found.values():
            assert (len(waited.first_s), len(waited.wave_s)) == (6, 2)
            for wave, wave_s in enumerate(waited.wave_s):
                assert 0 < max(waited.first_s[3 * wave : 3 * wave + 3]) < wave_s
        with pytest.raises(SystemExit, match=r"none: 'HTTP/1\.1 404"):
            asyncio.run(ask(server.url, ("none",), clients=1, waves=1))


def test_the_table_says_how_much_more_than_the_base(capsys: pytest.CaptureFixture[str]) -> None:
    _print({8: {"base": Waited([0.002, 0.004, 0.009], [0.01]), "mine": Waited([0.0105], [0.02])}})
    shown = [line.replace("│", " ").split() for line in capsys.readouterr().out.splitlines() if " 8 " in line]
    assert shown == [["8", "base", "4.00", "+0.00", "800"], ["8", "mine", "10.50", "+6.50", "400"]]
