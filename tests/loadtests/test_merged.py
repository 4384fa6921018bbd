"""The table of the merged engine's load test, of figures known by hand. The measurement itself needs four engines."""

from __future__ import annotations

import pytest

from loadtests.figures import Figures, Percentiles
from loadtests.merged import Measured, _print, _waves


def figures(tokens_per_s: float, ttft_s: float) -> Figures:
    same = Percentiles(ttft_s, ttft_s, ttft_s)
    return Figures(8, same, same, same, tokens_per_s, tokens_per_s, 1.0)


def started(bare: float, twin: float, merged: float, swapped: float) -> Measured:
    """Each way twice, at these tokens a second; their thousandth is the time to the first token."""
    ways = {"bare": bare, "twin": twin, "merged": merged, "LoRA": swapped}
    return {8: {way: [figures(speed, speed / 1000)] * 2 for way, speed in ways.items()}}


def lines(capsys: pytest.CaptureFixture[str], starts: list[Measured]) -> list[str]:
    _print(starts)
    return [line for line in capsys.readouterr().out.splitlines() if " 8 " in line]


def test_the_table_has_every_ratio_of_every_measure(capsys: pytest.CaptureFixture[str]) -> None:
    shown = lines(capsys, [started(50, 51, 49, 25)])
    assert len(shown) == 3
    for line in shown:
        assert all(each in line for each in (" 0.980 ", " 1.020 ", " 1.960 ")), line


def test_an_interval_is_of_the_starts_not_of_the_repetitions(capsys: pytest.CaptureFixture[str]) -> None:
    same = lines(capsys, [started(50, 50, 49, 25)] * 3)
    assert "0.980 (0.980 to 0.980)" in same[0]
    # Logarithms ±0.1 around 0: 12.706 standard errors of two values reach 12.706 · 0.1 to either side.
    apart = lines(capsys, [started(50, 50, 50 * 1.105170918, 25), started(50, 50, 50 / 1.105170918, 25)])
    assert "1.000 (0.281 to 3.563)" in apart[0]


def test_every_client_asks_several_times() -> None:
    waves = _waves("mine", 16, 64)
    assert (waves.requests, waves.concurrency, waves.output_tokens.low, waves.models) == (64, 16, 64, ("mine",))
    assert _waves("mine", 1, 64).requests == 8
