"""FLOW merge, third: what was written is measured before anybody can see it, and refused above the budget.

It joins the report to the merge; neither knows the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from adapters.errors import Unfaithful
from adapters.merge.apply import Check
from adapters.merge.plan import MergePlan
from adapters.merge.report import Budget, FidelityReport, VariantReport

Told = Callable[[str, int, int], None]


def check_of(plan: MergePlan, budget: Budget | None, tokens: int, told: Told = lambda what, done, of: None) -> Check:
    """For `write_merged`. `budget`: None takes it however far it is; `tokens`: of the task. It raises Unfaithful."""

    def check(directory: Path) -> Mapping[str, Any]:
        report = measured(plan, directory, tokens, told)
        require_faithful(report, budget)
        return report.to_json()

    return check


def measured(plan: MergePlan, directory: Path, tokens: int, told: Told) -> FidelityReport:
    """The same merge gives the same report, and so the same files, whenever it is done: times are left out."""
    from adapters.merge.fidelity import Asked, measure
    from adapters.merge.planned_weights import PlannedWeights, trained_on

    asked = Asked(plan.adapter, trained_on(plan), plan.choice.values, plan.dtype, tokens=tokens, written=directory)
    report = measure(asked, PlannedWeights(plan), told)
    return replace(report, variants=tuple(replace(each, seconds=0.0) for each in report.variants))


def require_faithful(report: FidelityReport, budget: Budget | None) -> None:
    if budget is not None and not (judged := report.within(budget)).passed:
        raise Unfaithful(
            f"what was merged ({report.judged}) is not what the adapter is: "
            f"{'; '.join(judged.reasons)}. Merge it onto the base that it was trained on, allow more, or take the loss"
        )


def summary(report: FidelityReport, budget: Budget) -> dict[str, Any]:
    """A report in the figures of the variant that was wanted."""
    found, reference = report.named(report.judged), report.reference
    assert found is not None
    judged = report.within(budget)
    return {
        "judged": report.judged,
        "trained_on": report.trained_on,
        "probes": report.probes,
        "within_budget": judged.passed,
        "reasons": list(judged.reasons),
        **{texts: _figures(found, reference, texts) for texts in ("task", "general")},
    }


def _figures(found: VariantReport, reference: VariantReport, texts: str) -> dict[str, float]:
    own, theirs = getattr(found, texts), getattr(reference, texts)
    return {
        "kl": own.kl,
        "mean_change": own.mean_change,
        "largest_change": own.largest_change,
        "same_top": own.same_top,
        "loss": own.loss,
        "loss_increase": own.loss - theirs.loss,
    }
