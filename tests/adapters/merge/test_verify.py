from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from adapters.base import BaseModel
from adapters.errors import Unfaithful
from adapters.merge.apply import write_merged
from adapters.merge.plan import MergePlan, plan_merge
from adapters.merge.report import Budget, FidelityReport
from adapters.merge.verify import FILE, PICTURE, Wishes, check_of, require, summary
from tests.adapters.merge.test_report import REPORT, variant

FEW = Wishes(tokens=20)


@pytest.fixture(scope="module")
def plan(sure_base: Path, sure_adapter: Path) -> MergePlan:
    return plan_merge(sure_adapter, BaseModel.read(sure_base), "original")


def test_a_merge_whose_loss_is_accepted_has_its_report_beside_it(plan: MergePlan, tmp_path: Path) -> None:
    record = write_merged(plan, tmp_path / "out", check=check_of(plan, replace(FEW, accept_loss=True)))
    whole = FidelityReport.from_json(json.loads((tmp_path / "out" / FILE).read_text()))
    kept = record["fidelity"]
    assert FidelityReport.from_json(kept["report"]) == replace(whole, modules=())
    assert kept["above_budget"] == list(whole.within(Budget()).reasons) != []
    assert (tmp_path / "out" / PICTURE).read_bytes().startswith(b"\x89PNG")
    assert FILE in (tmp_path / "out" / "SHA256SUMS").read_text()


def test_what_was_measured_is_not_measured_again(plan: MergePlan, tmp_path: Path) -> None:
    heard: list[str] = []

    def told(what: str, done: int, of: int) -> None:
        heard.append(what)

    for wishes, is_measured in ((FEW, True), (replace(FEW, budget=Budget(0.0, 0.0)), False), (Wishes(tokens=21), True)):
        heard.clear()
        with pytest.raises(Unfaithful):
            write_merged(plan, tmp_path / "out", check=check_of(plan, wishes, told))
        assert bool(heard) is is_measured
    report = tmp_path / ".out.merging" / FILE
    report.write_text(report.read_text()[:100])
    heard.clear()
    write_merged(plan, tmp_path / "out", check=check_of(plan, replace(FEW, tokens=21, accept_loss=True), told))
    assert heard, "half a report is none"


def test_the_message_says_what_to_do() -> None:
    with pytest.raises(Unfaithful, match=r"trained on \(dequantized\), or .*max_kl.* \(accept_loss\)"):
        require(replace(REPORT, judged="merged, original, bfloat16"), Wishes())
    require(REPORT, Wishes())
    four_bits = replace(REPORT, judged="merged, dequantized, nf4")
    with pytest.raises(Unfaithful, match=r"is left, at least 50%\. Take a format of more bits, or"):
        require(four_bits, Wishes())
    with pytest.raises(Unfaithful, match=r"Take the base's values before NF4 \(original\), or"):
        require(replace(four_bits, variants=(*REPORT.variants, variant("merged", "original", "nf4"))), Wishes())


def test_a_summary_is_of_the_merge_that_was_wanted_against_the_adapter() -> None:
    found = summary(replace(REPORT, judged="merged, dequantized, nf4"), Budget(max_kl=2.0))
    assert (found["within_budget"], len(found["reasons"])) == (False, 2)
    assert found["task"] == {
        "kl": 1.5,
        "mean_change": 0.0,
        "largest_change": 0.0,
        "same_top": 1.0,
        "loss": 3.9,
        "loss_increase": pytest.approx(1.9),
    }
