"""The table of the merged engine's load test, of figures known by hand. The measurement itself needs three engines."""

from __future__ import annotations

import pytest

from loadtests.figures import Figures, Percentiles
from loadtests.merged import _print, _wave


def figures(tokens_per_s: float, ttft_s: float) -> Figures:
    same = Percentiles(ttft_s, ttft_s, ttft_s)
    return Figures(8, same, same, same, tokens_per_s, tokens_per_s, 1.0)


def test_the_table_has_both_ratios_of_every_measure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    ways = {"bare": [figures(50, 0.1)], "merged": [figures(49, 0.102)], "LoRA": [figures(25, 0.204)]}
    _print({8: ways})
    lines = [line for line in capsys.readouterr().out.splitlines() if " 8 " in line]
    assert len(lines) == 3
    assert "0.980 (0.980 to 0.980)" in lines[0]
    assert "1.960 (1.960 to 1.960)" in lines[0]
    assert "1.020 (1.020 to 1.020)" in lines[2]
    assert "0.500 (0.500 to 0.500)" in lines[2]


def test_a_wave_is_as_many_requests_at_once_as_there_are_clients() -> None:
    wave = _wave("mine", 8, 64)
    assert (wave.requests, wave.concurrency, wave.output_tokens.low, wave.models) == (8, 8, 64, ("mine",))
