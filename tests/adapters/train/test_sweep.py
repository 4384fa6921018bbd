"""The grid with runs that are given, and one small grid that is really trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from adapters.errors import ConfigError, Diverged
from adapters.train.cli import main
from adapters.train.config import TrainConfig
from adapters.train.grid import RESULTS, Point, Result, points, read_results, sweep

GRID = points(["q_proj", "attention-qv"], [2, 4], ["2r"])


def ignore(result: Result) -> None: ...


class Runs:
    """Gives a loss for each configuration; notes what was run; stops or diverges where it is told to."""

    def __init__(self, stop_after: int = 99, diverge_at: int = 99) -> None:
        self.seen: list[TrainConfig] = []
        self.stop_after, self.diverge_at = stop_after, diverge_at

    def __call__(self, config: TrainConfig) -> tuple[float, float, float]:
        if len(self.seen) == self.stop_after:
            raise KeyboardInterrupt
        self.seen.append(config)
        if config.peft.r == self.diverge_at:
            raise Diverged("step 1: the loss is nan")
        return 3.0, 1.0 / config.peft.rank(0), 0.5


def test_a_grid_is_every_combination_and_alpha_may_follow_the_rank() -> None:
    assert [(point.targets, point.r, point.lora_alpha) for point in points(["mlp"], [1, 8], ["2r", "16"])] == [
        ("mlp", 1, 2),
        ("mlp", 1, 16),
        ("mlp", 8, 16),
        ("mlp", 8, 16),
    ]


@pytest.mark.parametrize("alpha", ["r", "0", "-1", "1.5"])
def test_another_alpha_is_refused(alpha: str) -> None:
    with pytest.raises(ConfigError, match="expected a whole number"):
        points(["mlp"], [1], [alpha])


def test_every_run_differs_in_nothing_but_the_point(config: TrainConfig, tmp_path: Path) -> None:
    runs = Runs()
    results = sweep(config, GRID, tmp_path / "out", runs, ignore)
    assert [(each.peft.modules_for_peft(), each.peft.r, each.peft.lora_alpha) for each in runs.seen] == [
        (["q_proj"], 2, 4),
        (["q_proj"], 4, 8),
        (["q_proj", "v_proj"], 2, 4),
        (["q_proj", "v_proj"], 4, 8),
    ]
    assert all((each.training, each.data) == (config.training, config.data) for each in runs.seen)
    assert [result.loss for result in results] == [0.5, 0.25, 0.5, 0.25]
    assert results[0].parameters == 2 * 2 * (64 + 64)  # two layers of 64 × 64


def test_a_sweep_that_was_stopped_goes_on_where_it_stopped(config: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        sweep(config, GRID, tmp_path / "out", Runs(stop_after=2), ignore)
    with (tmp_path / "out" / RESULTS).open("a") as file:
        file.write('{"key": "cut o')
    second = Runs()
    results = sweep(config, GRID, tmp_path / "out", second, ignore)
    assert len(second.seen) == 2
    assert [result.loss for result in results] == [0.5, 0.25, 0.5, 0.25]
    assert sweep(config, GRID, tmp_path / "out", Runs(stop_after=0), ignore) == results


def test_a_result_is_not_used_for_other_data(config: TrainConfig, tmp_path: Path) -> None:
    sweep(config, GRID, tmp_path / "out", Runs(), ignore)
    rows = config.data.train[0].path
    with rows.open("a") as file:
        file.write(rows.read_text().splitlines()[0].replace("Hello", "Good day") + "\n")
    second = Runs()
    sweep(config, GRID, tmp_path / "out", second, ignore)
    assert len(second.seen) == len(GRID)


def test_a_run_that_diverges_is_a_result_and_the_others_go_on(config: TrainConfig, tmp_path: Path) -> None:
    results = sweep(config, GRID, tmp_path / "out", Runs(diverge_at=4), ignore)
    assert [result.loss for result in results] == [0.5, None, 0.5, None]
    assert list(read_results(tmp_path / "out" / RESULTS)) == results


@pytest.mark.parametrize("point", [Point("c_proj", 2, "2r"), Point("everything", 2, "2r"), Point("mlp", 1000, "2r")])
def test_a_point_that_makes_no_sense_is_refused_before_anything_is_run(
    config: TrainConfig, tmp_path: Path, point: Point
) -> None:
    runs = Runs()
    with pytest.raises(ConfigError):
        sweep(config, [*GRID, point], tmp_path / "out", runs, ignore)
    assert runs.seen == []


def test_the_command_trains_prints_a_table_and_draws(
    write_yaml: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = ["--r", "1", "8", "--targets", "attention-qv", "--steps", "2", "--out", str(tmp_path / "swept")]
    assert main(["sweep", str(write_yaml()), *grid]) == 0
    told = capsys.readouterr()
    assert "r = 8" in told.out
    assert "lowest: attention-qv" in told.err
    assert sorted(path.name for path in (tmp_path / "swept").iterdir()) == ["sweep.jsonl", "sweep.png"]
    lines = [json.loads(line) for line in (tmp_path / "swept" / RESULTS).read_text().splitlines()]
    assert [(line["r"], line["loss"] < line["base"]) for line in lines] == [(1, True), (8, True)]
