"""What is measured at the command line, on a base that is a model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from adapters.merge.fidelity_cli import main
from adapters.merge.report import FidelityReport
from server.cli import main as loraplex


@pytest.fixture
def words(sure_base: Path, sure_adapter: Path) -> list[str]:
    return [str(sure_adapter), "--base", str(sure_base), "--tokens", "20"]


def test_a_merge_onto_the_wrong_base_is_shown_refused_and_waits_for_a_yes(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trained on NF4, merged onto the 16-bit base."""
    out, place = tmp_path / "out", tmp_path / ".out.merging"
    command = ["merge", *words, "--out", str(out), "--from", "original"]
    assert loraplex(command) == 7
    told = capsys.readouterr()
    assert "above the budget: KL to the adapter on task" in told.out
    assert "merged, original, bfloat16 is above the budget" in told.err
    assert f"Its report is {place}/fidelity.json, drawn in fidelity.png there" in told.err
    assert list(tmp_path.iterdir()) == [place]
    measured = json.loads((place / "fidelity.json").read_text())
    assert (place / "fidelity.png").is_file()

    assert loraplex([*command, "--accept-loss"]) == 0
    assert "above the budget: KL to the adapter on task" in capsys.readouterr().out, "shown again"
    assert list(tmp_path.iterdir()) == [out]
    assert json.loads((out / "fidelity.json").read_text()) == measured


def test_fidelity_alone_gives_the_report(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert loraplex(["fidelity", *words, "--json", "--png", str(tmp_path / "report.png")]) == 0
    report = FidelityReport.from_json(json.loads(capsys.readouterr().out))
    assert (report.judged, report.task_tokens) == ("merged, dequantized, bfloat16", 20)
    assert (tmp_path / "report.png").is_file()


def test_each_trouble_has_an_exit_code(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--data", str(tmp_path / "nothing.jsonl")]) == 8
    assert "nothing.jsonl: cannot be read" in capsys.readouterr().err
    assert main([str(tmp_path), *words[1:]]) == 3
    with pytest.raises(SystemExit, match="2"):
        main([*words[:-1], "0"])
