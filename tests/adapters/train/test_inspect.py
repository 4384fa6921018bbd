"""On matrices whose singular vectors are known by hand, and on an adapter as files."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from adapters.base import BaseModel
from adapters.convert.change import Factors
from adapters.errors import TrainError
from adapters.train.cli import main
from adapters.train.inspection import inspect, judge
from tests.adapters.factories import MODULES, AdapterFiles, write_base

WEIGHT = np.diag([8.0, 4.0, 2.0, 1.0]).astype(np.float32)


def along(direction: int, size: float, rank: int = 2) -> Factors:
    """ΔW of `size` that reads one input direction and writes the same output direction; the other ranks are zero."""
    a, b = np.zeros((rank, 4), np.float32), np.zeros((4, rank), np.float32)
    a[0, direction], b[direction, 0] = 1, size
    return Factors(b, a)


def test_an_adapter_along_the_bases_first_direction_overlaps_fully() -> None:
    found = judge("m", along(0, 2.0), WEIGHT)
    assert (found.rank, found.in_use) == (2, 1)
    assert found.singular_values == pytest.approx((2.0, 0.0))
    assert found.effective == pytest.approx(1.0)
    assert found.change == pytest.approx(2 / math.sqrt(64 + 16 + 4 + 1))
    assert found.overlap == pytest.approx(1.0)
    assert found.chance == 0.25
    assert found.amplification == pytest.approx(2 / 8)


def test_one_along_a_direction_that_the_base_hardly_uses_amplifies_it() -> None:
    found = judge("m", along(3, 2.0), WEIGHT)
    assert found.overlap == pytest.approx(0.0, abs=1e-12)
    assert found.amplification == pytest.approx(2 / 1)


@pytest.mark.parametrize("shape", [(4, 6), (6, 4)])
def test_input_directions_are_those_of_a_full_decomposition(shape: tuple[int, int]) -> None:
    random = np.random.default_rng(0)
    weight = random.standard_normal(shape).astype(np.float32)
    b = random.standard_normal((shape[0], 2)).astype(np.float32)
    change = Factors(b, random.standard_normal((2, shape[1])).astype(np.float32))
    found = judge("m", change, weight)
    right = np.linalg.svd(weight.astype(np.float64))[2][:2].T
    mine = np.linalg.svd(change.b @ change.a)[2][:2].T
    assert found.overlap == pytest.approx(np.sum((right.T @ mine) ** 2) / 2, rel=1e-5)
    assert found.change == pytest.approx(np.linalg.norm(change.b @ change.a) / np.linalg.norm(weight), rel=1e-5)


def test_one_that_changes_nothing_uses_no_direction() -> None:
    found = judge("m", along(0, 0.0), WEIGHT)
    assert (found.in_use, found.effective, found.change) == (0, 0.0, 0.0)


def test_without_plain_weights_of_the_base_what_compares_with_them_is_unknown() -> None:
    found = judge("m", along(0, 2.0), None)
    assert math.isnan(found.change)
    assert math.isnan(found.overlap)
    assert found.in_use == 1


def test_every_module_is_looked_at_with_its_scaling(tmp_path: Path) -> None:
    base = BaseModel.read(write_base(tmp_path / "base"))
    plain = inspect(AdapterFiles().write(tmp_path / "one"), base)
    config = AdapterFiles().config
    doubled = inspect(
        AdapterFiles(config=config | {"lora_alpha": 2 * config["lora_alpha"]}).write(tmp_path / "two"), base
    )
    assert [found.module for found in plain] == sorted(MODULES)
    assert [two.change / one.change for one, two in zip(plain, doubled, strict=True)] == pytest.approx(
        [2.0] * len(plain)
    )


def test_the_command_prints_a_table_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, adapter = write_base(tmp_path / "base"), AdapterFiles().write(tmp_path / "adapter")
    assert main(["inspect", str(adapter), "--base", str(base)]) == 0
    assert "q_proj" in capsys.readouterr().out
    assert (tmp_path / "adapter-inspection.png").read_bytes().startswith(b"\x89PNG")
    assert main(["inspect", str(adapter), "--base", str(base), "--json"]) == 0
    assert [each["module"] for each in json.loads(capsys.readouterr().out)] == sorted(MODULES)


def test_a_directory_that_is_no_adapter_is_refused(tmp_path: Path) -> None:
    base = BaseModel.read(write_base(tmp_path / "base"))
    with pytest.raises(TrainError, match=r"has no adapter_config\.json"):
        inspect(tmp_path, base)
