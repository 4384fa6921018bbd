"""The whole report, on a small base and a random adapter."""

from __future__ import annotations

import json
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console

from adapters.base import BaseModel
from adapters.merge.apply import write_merged
from adapters.merge.fidelity import Asked, measure
from adapters.merge.plan import MergePlan, plan_merge
from adapters.merge.planned_weights import PlannedWeights, trained_on
from adapters.merge.report import BASES, Budget, FidelityReport, VariantReport
from adapters.merge.report_chart import draw
from adapters.merge.report_table import label, show
from tests.adapters.merge.peft_weights import PeftWeights

TOKENS = 60


@pytest.fixture(scope="module")
def told() -> list[tuple[str, int, int]]:
    return []


@pytest.fixture(scope="module")
def plan(sure_base: Path, sure_adapter: Path) -> MergePlan:
    return plan_merge(sure_adapter, BaseModel.read(sure_base))


@pytest.fixture(scope="module")
def report(plan: MergePlan, told: list[tuple[str, int, int]]) -> FidelityReport:
    asked = Asked(plan.adapter, trained_on=trained_on(plan), onto=plan.choice.values, tokens=TOKENS)
    return measure(asked, PlannedWeights(plan), lambda *progress: told.append(progress))


def of(report: FidelityReport, part: str, base: str, stored: str) -> VariantReport:
    found = report.variant(part, base, stored)
    assert found is not None, (part, base, stored)
    return found


def test_every_path_is_compared(report: FidelityReport) -> None:
    assert [variant.name for variant in report.variants] == [
        "adapter, dequantized, float32",
        "adapter, dequantized, bfloat16",
        "merged, dequantized, float32",
        "merged, dequantized, bfloat16",
        "merged, original, bfloat16",
        "merged, dequantized, nf4",
        "merged, original, nf4",
        "base, original, bfloat16",
        "base, dequantized, bfloat16",
    ]
    assert (report.task_tokens, report.general_tokens) == (TOKENS, TOKENS // 2)


def test_a_merge_in_fp32_is_the_adapter(report: FidelityReport) -> None:
    exact = of(report, "merged", "dequantized", "float32")
    assert exact.task.kl < 1e-6
    assert exact.task.largest_change < 1e-3
    assert exact.task.same_top == exact.general.same_top == 1.0


def test_rounded_it_is_near_and_on_the_other_base_far(report: FidelityReport) -> None:
    rounded = of(report, "merged", "dequantized", "bfloat16").task.kl
    assert 0 < rounded < of(report, "merged", "original", "bfloat16").task.kl / 3
    assert report.within(Budget()).passed


def test_the_adapter_does_something_and_the_bare_base_is_without_it(report: FidelityReport) -> None:
    bare = of(report, "base", "dequantized", "bfloat16").task.kl
    assert bare > 10 * of(report, "merged", "dequantized", "bfloat16").task.kl


def test_progress_ends_with_all_of_it(report: FidelityReport, told: list[tuple[str, int, int]]) -> None:
    done = [each[1] for each in told]
    assert done == sorted(done)
    assert told[-1][1] == told[-1][2]


def test_every_module_is_measured_on_both_bases(report: FidelityReport) -> None:
    assert len(report.modules) == 2 * 2 * 7
    assert [(each.base, each.stored) for each in report.formats] == [
        ("dequantized", "bfloat16"),
        ("dequantized", "float16"),
        ("dequantized", "q8_0"),
        ("dequantized", "nf4"),
        ("original", "nf4"),
    ]
    assert report.formats[0].kept == pytest.approx(1.0, abs=0.02)


def test_it_survives_json(report: FidelityReport) -> None:
    assert FidelityReport.from_json(json.loads(json.dumps(report.to_json()))) == report


def test_it_is_shown_and_drawn(report: FidelityReport, tmp_path: Path) -> None:
    output = StringIO()
    show(report, report.within(Budget(max_kl=0.0)), Console(file=output, width=80))
    text = output.getvalue()
    assert all(label(variant) in text for variant in report.variants)
    assert "above the budget: KL to the adapter on task" in text
    draw(report, tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_without_a_record_of_training_nf4_is_the_reference(plan: MergePlan) -> None:
    assert trained_on(plan) == "dequantized"


@pytest.mark.parametrize("which", BASES)
def test_the_tensors_are_those_that_peft_merges(
    plan: MergePlan, sure_base: Path, sure_adapter: Path, which: str
) -> None:
    planned, theirs = PlannedWeights(plan), PeftWeights(sure_base, sure_adapter)
    for ours, expected in ((planned.base(which), theirs.base(which)), (planned.merged(which), theirs.merged(which))):
        wanted = dict(expected)
        for name, tensor in ours.items():
            assert torch.allclose(tensor.float(), wanted.pop(name), atol=1e-6), name
        assert not wanted


def test_the_files_of_a_merge_are_what_is_judged(plan: MergePlan, sure_base: Path) -> None:
    """Here the wrong ones: the base itself."""
    asked = Asked(plan.adapter, trained_on="dequantized", onto="dequantized", tokens=20, written=sure_base)
    report = measure(asked, PlannedWeights(plan))
    judged, bare = of(report, "merged", "dequantized", "bfloat16"), of(report, "base", "original", "bfloat16")
    assert judged.task == bare.task
    assert not report.within(Budget()).passed


@pytest.fixture(scope="module")
def four_bits(plan: MergePlan) -> FidelityReport:
    asked = Asked(plan.adapter, trained_on="dequantized", onto="original", stored="nf4", tokens=TOKENS)
    return measure(asked, PlannedWeights(plan))


def test_in_four_bits_it_is_measured_what_they_cost_the_base(four_bits: FidelityReport, report: FidelityReport) -> None:
    assert four_bits.wanted == of(four_bits, "merged", "original", "nf4")
    assert four_bits.within(Budget()).passed
    assert not four_bits.within(Budget(max_kl=0.01)).passed
    original, packed = (of(four_bits, "base", base, "bfloat16") for base in ("original", "dequantized"))
    assert four_bits.nf4_costs["task"].loss == pytest.approx(packed.task.loss - original.task.loss)
    assert four_bits.nf4_costs["general"].kl > 0.01
    assert report.nf4_costs == {}


def test_a_merge_in_fp32_is_judged_as_what_it_becomes(
    plan: MergePlan, four_bits: FidelityReport, tmp_path: Path
) -> None:
    whole = plan_merge(plan.adapter, plan.base, "original", "float32")
    write_merged(whole, tmp_path / "out")
    asked = Asked(plan.adapter, "dequantized", "original", "nf4", tokens=TOKENS, written=tmp_path / "out")
    report = measure(replace(asked, written_as="float32"), PlannedWeights(whole))
    assert report.wanted.task.kl == pytest.approx(four_bits.wanted.task.kl, rel=1e-3)


def test_q8_0_is_measured_as_gguf_holds_it(plan: MergePlan, report: FidelityReport) -> None:
    asked = Asked(plan.adapter, trained_on="dequantized", onto="dequantized", stored="q8_0", tokens=TOKENS)
    packed = measure(asked, PlannedWeights(plan)).wanted
    assert packed.computed == "float32"
    exact = of(report, "merged", "dequantized", "float32").task.kl
    assert 10 * exact < packed.task.kl < of(report, "merged", "dequantized", "nf4").task.kl / 3
