"""A planned merge through the fidelity report and its budget, before anybody sees the result of `loraplex merge`.

A merge that is above the budget is refused, unless its loss is accepted. The report lies beside the weights, whole and
as a picture; its summary goes into the record of the merge. What was measured before is not measured again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.checksums import sha256_of
from adapters.errors import Unfaithful
from adapters.merge.report import Budget, FidelityReport, Told, VariantReport
from adapters.upload import HELD_OUT

if TYPE_CHECKING:
    from adapters.merge.plan import MergePlan

FILE, PICTURE = "fidelity.json", "fidelity.png"
MEASURING = "fidelity-1"
"""Changes when the same would give other figures."""
TOKENS = 2048
"""Of the task; half as many of general text. Of a vocabulary of 128,256 words, one takes half a megabyte of disk."""


@dataclass(frozen=True)
class Wishes:
    data: tuple[Path, ...] = ()
    """Files of the task; without them, what the adapter held out, or chats of our own."""
    general: Path | None = None
    tokens: int = TOKENS
    budget: Budget = field(default_factory=Budget)
    accept_loss: bool = False
    stored: str | None = None
    """The format of adapters/merge/formats.py that the merge ends in; None: its own type."""


def measured(
    plan: MergePlan, wishes: Wishes, told: Told = lambda what, done, of: None, written: Path | None = None
) -> FidelityReport:
    """`written`: the merge's directory, where there is one: its files are what is judged."""
    from adapters.merge.fidelity import Asked, measure
    from adapters.merge.planned_weights import PlannedWeights, trained_on

    asked = Asked(
        adapter=plan.adapter,
        trained_on=trained_on(plan),
        onto=plan.choice.values,
        stored=wishes.stored or plan.dtype,
        data=wishes.data,
        general=wishes.general,
        tokens=wishes.tokens,
        written=written,
        written_as=plan.dtype,
    )
    return measure(asked, PlannedWeights(plan), told)


def check_of(
    plan: MergePlan,
    wishes: Wishes,
    told: Told = lambda what, done, of: None,
    shown: Callable[[FidelityReport], None] = lambda report: None,
) -> Callable[[Path], Mapping[str, Any]]:
    """For `apply.write_merged`. `shown` gets the report before it is judged."""

    def check(directory: Path) -> Mapping[str, Any]:
        from adapters.merge.report_chart import draw

        asked = asked_of(plan, wishes)
        report = _measured_before(directory, asked) or replace(measured(plan, wishes, told, directory), asked=asked)
        (directory / FILE).write_text(json.dumps(report.to_json(), indent=1) + "\n", encoding="utf-8")
        draw(report, directory / PICTURE)
        shown(report)
        require(report, wishes)
        above = report.within(wishes.budget).reasons
        return {
            "budget": asdict(wishes.budget),
            "above_budget": list(above),
            "report": report.to_json(modules=False),
        }

    return check


def asked_of(plan: MergePlan, wishes: Wishes) -> str:
    """`sha256:<hex>` of what the figures come from: the merge, the format that it is judged in, and the texts."""
    from adapters.merge.probes import CHATS, PROSE

    texts = (*wishes.data, wishes.general or PROSE, plan.adapter / HELD_OUT, CHATS)
    sums = [sha256_of(path) if path.is_file() else None for path in texts]
    told = [MEASURING, plan.digest, wishes.stored or plan.dtype, wishes.tokens, sums]
    return f"sha256:{hashlib.sha256(json.dumps(told).encode()).hexdigest()}"


def _measured_before(directory: Path, asked: str) -> FidelityReport | None:
    """By a merge that was refused, or stopped behind its report."""
    try:
        found = read_report(directory)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if found.asked == asked else None


def read_report(directory: Path) -> FidelityReport:
    """Of a merge that was measured."""
    return FidelityReport.from_json(json.loads((directory / FILE).read_text(encoding="utf-8")))


def require(report: FidelityReport, wishes: Wishes) -> None:
    """Raises Unfaithful above the budget, unless the loss is accepted."""
    judgement = report.within(wishes.budget)
    if judgement.passed or wishes.accept_loss:
        return
    raise Unfaithful(
        f"{report.judged} is above the budget: {'; '.join(judgement.reasons)}. Take {_nearer(report)}, or a larger "
        "budget (max_kl, max_loss_increase); or accept the loss (accept_loss)"
    )


def _nearer(report: FidelityReport) -> str:
    """What would differ less."""
    stored = report.wanted.stored
    if stored == "nf4" and report.onto == "dequantized" and report.variant("merged", "original", stored):
        return "the base's values before NF4 (original)"
    if stored != "nf4" and report.onto != report.trained_on:
        return f"the base that it was trained on ({report.trained_on})"
    return "a format of more bits"


def summary(report: FidelityReport, budget: Budget) -> dict[str, Any]:
    """A report in the figures of the variant that was wanted."""
    found, reference = report.wanted, report.reference
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
