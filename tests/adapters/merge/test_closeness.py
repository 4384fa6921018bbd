"""On distributions whose divergence is known by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from adapters.merge.closeness import Reference, kl

HALVES = torch.tensor([[0.5, 0.5, 0.0]]).log()
QUARTERS = torch.tensor([[0.25, 0.25, 0.5]]).log()
SKEWED = torch.tensor([[0.9, 0.05, 0.05]]).log()


def tokens(*wanted: int) -> torch.Tensor:
    return torch.tensor(wanted)


def test_the_divergence_of_a_half_from_a_quarter_is_ln_2_a_token() -> None:
    assert kl(HALVES, QUARTERS).item() == pytest.approx(math.log(2))


def test_it_is_not_the_divergence_the_other_way_round() -> None:
    assert kl(QUARTERS, QUARTERS).item() == 0.0
    expected = 0.25 * math.log(0.25 / 0.9) + 0.25 * math.log(0.25 / 0.05) + 0.5 * math.log(0.5 / 0.05)
    assert kl(QUARTERS, SKEWED).item() == pytest.approx(expected, rel=1e-5)


def test_the_first_that_is_judged_is_what_the_others_are_compared_with(tmp_path: Path) -> None:
    reference = Reference(tmp_path / "rows", 3)
    chunks = [(QUARTERS.repeat(2, 1), tokens(0, 2)), (SKEWED, tokens(0))]
    itself = reference.judge(chunks)
    assert itself.loss == pytest.approx(-(math.log(0.25) + math.log(0.5) + math.log(0.9)) / 3)
    assert (itself.kl, itself.mean_change, itself.largest_change, itself.same_top) == (0.0, 0.0, 0.0, 1.0)

    other = reference.judge([(QUARTERS, tokens(0)), (SKEWED, tokens(2)), (SKEWED, tokens(0))])
    assert other.loss == pytest.approx(-(math.log(0.25) + math.log(0.05) + math.log(0.9)) / 3)
    assert other.kl == pytest.approx(kl(QUARTERS, SKEWED).item() / 3, rel=1e-5)
    assert other.largest_change == pytest.approx(math.log(0.5 / 0.05))
    assert other.mean_change == pytest.approx(math.log(0.5 / 0.05) / 3)
    assert other.same_top == pytest.approx(2 / 3)
    assert itself.loss_error == 0.0
    assert other.loss_error == pytest.approx(math.log(0.5 / 0.05) / 3)  # of 0, x and 0: x / √3, by √3


def test_of_one_token_nothing_is_known_of_how_its_loss_scatters(tmp_path: Path) -> None:
    reference = Reference(tmp_path / "rows", 1)
    reference.judge([(QUARTERS, tokens(0))])
    assert reference.judge([(SKEWED, tokens(0))]).loss_error == 0.0


def test_what_the_reference_says_lies_on_disk(tmp_path: Path) -> None:
    Reference(tmp_path / "rows", 2).judge([(SKEWED.repeat(2, 1), tokens(0, 1))])
    assert (tmp_path / "rows").stat().st_size == 2 * 3 * 4


def test_another_number_of_tokens_is_a_fault_of_ours(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        Reference(tmp_path / "rows", 2).judge([(SKEWED, tokens(0))])
