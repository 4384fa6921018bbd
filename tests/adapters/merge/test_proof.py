from __future__ import annotations

import pytest

from adapters.errors import Unfaithful
from adapters.merge.proof import require_faithful, summary
from adapters.merge.report import Budget, Closeness, FidelityReport, VariantReport


def report(kl: float, loss: float) -> FidelityReport:
    def closeness(kl: float, loss: float) -> Closeness:
        return Closeness(loss=loss, kl=kl, mean_change=0.25, largest_change=0.5, same_top=0.75)

    reference, merged = closeness(0.0, 1.0), closeness(kl, loss)
    variants = (
        VariantReport("adapter", "dequantized", "float32", "float32", reference, reference, 0.0),
        VariantReport("merged", "original", "bfloat16", "float32", merged, merged, 0.0),
    )
    names = ("pilot", "base", "dequantized", "merged, original, bfloat16", "given texts")
    return FidelityReport(*names, 8, 4, variants, ())


def test_what_is_above_the_budget_is_refused_with_its_figures_and_without_a_budget_taken() -> None:
    require_faithful(report(0.01, 1.02), Budget(0.01, 0.03))
    require_faithful(report(9.0, 9.0), None)
    with pytest.raises(
        Unfaithful, match=r"merged, original, bfloat16.*KL to the adapter on task is 0\.1690.*at most 0\.01"
    ):
        require_faithful(report(0.169, 1.0), Budget(0.01, 0.02))


def test_a_summary_is_of_the_merge_that_was_wanted_against_the_adapter() -> None:
    found = summary(report(0.005, 1.25), Budget(0.01, 0.02))
    assert (found["within_budget"], len(found["reasons"])) == (False, 2)
    assert found["task"] == {
        "kl": 0.005,
        "mean_change": 0.25,
        "largest_change": 0.5,
        "same_top": 0.75,
        "loss": 1.25,
        "loss_increase": 0.25,
    }
