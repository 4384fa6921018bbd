"""Replay and a general set in a whole run: what was forgotten is in the log, the card and the scores."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapters.base import BaseModel
from adapters.train.config import load_config, with_files
from adapters.train.evaluate import held_out_loss
from adapters.train.identity import identity
from adapters.train.recipe import load, read_material, train
from adapters.validate import validate

GENERAL = [{"text": f"The rain of day {number} fell on the plain."} for number in range(12)]


@pytest.fixture
def configured(write_yaml: Callable[..., Path]) -> Callable[..., Any]:
    def configure(general_set: str | None = None, **data: Any) -> Any:
        path = write_yaml(data=data, eval={"prompts": [], "general_set": general_set})
        rows = [json.dumps(row) + "\n" for row in GENERAL]
        (path.parent / "replay.jsonl").write_text("".join(rows[:8]))
        (path.parent / "general.jsonl").write_text("".join(rows[8:]))
        return load_config(path)

    return configure


def test_what_was_forgotten_is_measured_at_every_look(configured: Callable[..., Any], small_base: Path) -> None:
    trained = train(configured("general.jsonl", replay={"path": "replay.jsonl", "ratio": 0.1}))
    lines = [json.loads(line) for line in (trained.directory / "log.jsonl").read_text().splitlines()]
    looks = {line["step"]: line["general_loss"] for line in lines if "general_loss" in line}
    assert list(looks) == [0, 1, 2, 3, 4]
    verdict = trained.verdict
    assert verdict.general_base is not None
    assert verdict.general_adapter is not None
    assert looks[0] == verdict.general_base
    assert verdict.general_adapter in looks.values()
    assert verdict.forgotten == verdict.general_adapter - verdict.general_base != 0
    manifest = validate(trained.directory, BaseModel.read(small_base), max_rank=16)
    assert manifest.scores["general_loss"] == pytest.approx(verdict.general_adapter, abs=1e-5)
    assert manifest.scores["general_loss_base"] == pytest.approx(verdict.general_base, abs=1e-5)
    assert manifest.lineage["replay_share"] >= 0.1
    assert f"| forgotten | {verdict.forgotten:+.3f} |" in (trained.directory / "README.md").read_text()


def test_the_general_loss_is_of_every_token_but_the_first_of_each_text(configured: Callable[..., Any]) -> None:
    """Against transformers' own loss, text by text."""
    import torch

    config = configured("general.jsonl")
    setup = load(config, read_material(config))
    total, count = 0.0, 0
    for example in setup.data.general:
        ids = torch.tensor([example.ids])
        with torch.no_grad(), setup.model.disable_adapter():
            total += setup.model(input_ids=ids, labels=ids).loss.item() * (len(example.ids) - 1)
        count += len(example.ids) - 1
    assert held_out_loss(setup.model, setup.data.general, 2, 2, base=True) == pytest.approx(total / count, rel=2e-3)


def test_without_general_data_nothing_is_said_of_it(configured: Callable[..., Any]) -> None:
    trained = train(configured())
    assert trained.verdict.forgotten is None
    assert "general" not in (trained.directory / "README.md").read_text()
    assert "general_loss" not in json.loads((trained.directory / "loraplex.json").read_text())["scores"]


def test_a_run_goes_on_wherever_its_files_lie_and_not_with_other_rows(configured: Callable[..., Any]) -> None:
    here = configured("general.jsonl", replay={"path": "replay.jsonl"})
    data = read_material(here).data
    known = identity(here, data)
    assert identity(with_files(here, lambda file: Path("/elsewhere") / file.name), data) == known
    other = configured("replay.jsonl", replay={"path": "general.jsonl"})
    changed = identity(other, read_material(other).data)
    assert {key for key in known if changed[key] != known[key]} == {"training data", "general data"}
