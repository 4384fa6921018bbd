from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from adapters.train.cli import main
from adapters.train.config import load_config
from adapters.train.journal import Evaluation, Journal, Step
from adapters.train.trackers import PACKAGES, tracked


def test_a_tracker_gets_every_figure_of_the_log(tmp_path: Path) -> None:
    seen: list[tuple[int, Mapping[str, float]]] = []
    with Journal(tmp_path, "sailor", 1, trackers=[lambda step, figures: seen.append((step, figures))]) as journal:
        journal.evaluated(Evaluation(0, 3.0))
        journal.record(Step(1, 2.5, 1.0, 1e-3, 40, 0.5))
    assert seen == [
        (0, {"held_out_loss": 3.0}),
        (1, {"loss": 2.5, "gradient_norm": 1.0, "learning_rate": 1e-3, "tokens": 40, "seconds": 0.5}),
    ]


@pytest.mark.parametrize("name", sorted(PACKAGES))
def test_one_that_is_not_installed_ends_a_run_before_it_begins(
    write_yaml: Callable[..., Path], name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda asked, *rest: None if asked == name else found(asked))
    path = write_yaml(output={"report_to": ["jsonl", name]})
    assert main(["run", str(path)]) == 2
    assert f"pip install {PACKAGES[name]}" in " ".join(capsys.readouterr().err.split())
    assert not (path.parent / "out").exists()


def test_the_log_alone_needs_nothing(write_yaml: Callable[..., Path]) -> None:
    with tracked(load_config(write_yaml())) as trackers:
        assert trackers == []


def test_tensorboard_has_the_figures(write_yaml: Callable[..., Path]) -> None:
    pytest.importorskip("tensorboard")
    config = load_config(write_yaml(output={"report_to": ["tensorboard"]}))
    with tracked(config) as trackers:
        trackers[0](3, {"loss": 2.5})
    accumulator: Any = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(config.output.output_dir) + ".tensorboard").Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(3, 2.5)]


def test_mlflow_has_the_figures(
    write_yaml: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    with tracked(load_config(write_yaml(output={"report_to": ["mlflow"]}))) as trackers:
        trackers[0](3, {"loss": 2.5})
    (run,) = mlflow.search_runs(experiment_names=["loraplex"], output_format="list")
    assert (run.data.metrics["loss"], run.data.params["output.name"]) == (2.5, "sailor")
