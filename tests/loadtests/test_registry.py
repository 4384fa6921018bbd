"""The registry's benchmark, from start to table, on a tiny base."""

from __future__ import annotations

from pathlib import Path

import pytest

from loadtests.registry import FEW, main
from tests.adapters.factories import write_base


def test_it_measures_what_it_registered(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    arguments = ["--model", str(write_base(tmp_path / "tiny")), "--data-dir", str(tmp_path / "data")]
    assert main([*arguments, "--versions", str(FEW + 4), "--repetitions", "1"]) == 0
    table = capsys.readouterr().out
    assert "14 versions" in table
    assert sum(" ms " in line for line in table.splitlines()) == 13
