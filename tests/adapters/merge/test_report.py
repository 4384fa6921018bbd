from __future__ import annotations

import json
from dataclasses import replace

import pytest

from adapters.merge.advice import advice, lost
from adapters.merge.report import (
    Budget,
    Closeness,
    Cost,
    FidelityReport,
    FormatReport,
    ModuleReport,
    Survival,
    VariantReport,
)
from adapters.merge.survival import summed

EXACT = Closeness(loss=2.0, kl=0.0, mean_change=0.0, largest_change=0.0, same_top=1.0)


def variant(part: str, base: str, stored: str, loss: float = 2.0, kl: float = 0.0, **general: float) -> VariantReport:
    task = replace(EXACT, loss=loss, kl=kl)
    return VariantReport(part, base, stored, "float32", task, replace(EXACT, **general))  # type: ignore[arg-type]


def module(base: str, size: float, kept: float) -> ModuleReport:
    return ModuleReport("model.layers.0.q_proj.weight", base, size, 0.01, {"nf4": Survival(kept, 1.0)})


MODULES = (module("dequantized", 3.0, 0.0), module("dequantized", 4.0, 0.5), module("original", 3.0, 1.0))
REPORT = FidelityReport(
    adapter="pirate",
    base="small",
    trained_on="dequantized",
    judged="merged, dequantized, bfloat16",
    probes="held out of its training",
    task_tokens=100,
    general_tokens=50,
    variants=(
        variant("adapter", "dequantized", "float32"),
        variant("adapter", "dequantized", "bfloat16", kl=0.001),
        variant("merged", "dequantized", "bfloat16", kl=0.002),
        variant("merged", "original", "bfloat16", kl=0.2, loss=2.01),
        variant("merged", "dequantized", "nf4", kl=1.5, loss=3.9),
        variant("base", "dequantized", "bfloat16", kl=1.6, loss=4.0),
    ),
    formats=tuple(summed(MODULES)),
    modules=MODULES,
)


def test_it_goes_to_json_and_back() -> None:
    for report in (REPORT, FOUR):
        assert FidelityReport.from_json(json.loads(json.dumps(report.to_json()))) == report


def test_what_is_kept_of_the_whole_is_weighed_by_the_size_of_each_change() -> None:
    assert REPORT.format("nf4") == FormatReport("dequantized", "nf4", (9 * 0.0 + 16 * 0.5) / 25, 0.0, 1.0)
    assert REPORT.format("nf4", "original") == FormatReport("original", "nf4", 1.0, 1.0, 1.0)
    assert REPORT.format("q8_0") is None


def test_a_summary_leaves_the_single_tensors_out_and_nothing_else() -> None:
    summed_up = FidelityReport.from_json(json.loads(json.dumps(REPORT.to_json(modules=False))))
    assert summed_up == replace(REPORT, modules=())
    assert advice(summed_up) == advice(REPORT)


def test_a_merge_near_the_adapter_is_within_the_budget() -> None:
    assert REPORT.within(Budget()).passed
    assert REPORT.onto == "dequantized"


def test_one_on_another_base_is_above_it_and_says_what_of() -> None:
    judged = REPORT.within(Budget(), "merged, original, bfloat16")
    assert judged.reasons == ("KL to the adapter on task is 0.2000 nats per token, at most 0.01",)
    assert REPORT.within(Budget(max_kl=0.3), "merged, original, bfloat16").passed


def test_a_loss_that_rises_is_above_it_too() -> None:
    judged = REPORT.within(Budget(max_kl=2.0), "merged, dequantized, nf4")
    assert judged.reasons[0] == "loss on task rises by 1.9000 ± 0.0000 to 3.9000 nats per token, by at most 0.02"


def test_of_few_tokens_a_loss_may_rise_by_chance() -> None:
    """By two standard errors beyond what is allowed, and KL is as strict as ever."""
    told = variant("merged", "original", "nf4", loss=2.04)
    for error, passes in ((0.0099, False), (0.0101, True)):
        rough = replace(told, task=replace(told.task, loss_error=error))
        assert replace(REPORT, variants=(*REPORT.variants, rough)).within(Budget(), rough.name).passed == passes
    far = replace(told, task=replace(told.task, loss_error=1.0, kl=0.011))
    (reason,) = replace(REPORT, variants=(*REPORT.variants, far)).within(Budget(), far.name).reasons
    assert reason.startswith("KL")


def test_what_is_hardly_left_of_the_change_is_lost_however_near_it_is() -> None:
    """A weak adapter that is gone is no further from itself than the rounding of four bits."""
    judged = REPORT.within(Budget(max_kl=2.0, max_loss_increase=2.0), "merged, dequantized, nf4")
    assert judged.reasons == ("32.0% of the adapter's change of the weights is left, at least 50%",)


FOUR = replace(
    REPORT,
    judged="merged, original, nf4",
    variants=(*REPORT.variants, variant("merged", "original", "nf4", loss=2.1, kl=0.2)),
    nf4_costs={"task": Cost(kl=0.16, loss=0.06), "general": Cost(kl=0.0, loss=-1.0)},
)


def test_four_bits_may_cost_what_they_cost_the_base_and_half_as_much_again() -> None:
    assert FOUR.within(Budget()).passed  # 0.2 of 0.01 + 1.5 * 0.16, and 0.1 of 0.02 + 1.5 * 0.06
    cheaper = replace(FOUR, nf4_costs={"task": Cost(kl=0.12, loss=0.05), "general": Cost(kl=0.0, loss=-1.0)})
    assert cheaper.within(Budget()).reasons == (
        "KL to the adapter on task is 0.2000 nats per token, at most 0.1900 (0.01, and 1.5 times the 0.1200 that NF4 "
        "costs the base itself)",
        "loss on task rises by 0.1000 ± 0.0000 to 2.1000 nats per token, by at most 0.0950 (0.02, and 1.5 times the "
        "0.0500 that NF4 costs the base itself)",
    )


def test_a_budget_that_is_asked_for_is_the_budget_in_four_bits_too() -> None:
    reasons = FOUR.within(Budget(max_kl=0.1, max_loss_increase=0.2)).reasons
    assert reasons == ("KL to the adapter on task is 0.2000 nats per token, at most 0.1",)


def test_only_four_bits_may_cost_what_four_bits_cost() -> None:
    assert not FOUR.within(Budget(), "merged, original, bfloat16").passed


def test_a_report_of_before_there_were_costs_is_read() -> None:
    before = REPORT.to_json()
    del before["nf4_costs"]
    assert FidelityReport.from_json(before) == REPORT


def test_general_text_counts_as_well() -> None:
    worse = variant("merged", "dequantized", "bfloat16", loss=2.0)
    general = replace(EXACT, loss=2.5, kl=0.5)
    report = replace(REPORT, variants=(REPORT.reference, replace(worse, general=general)))
    assert [reason.partition(" is ")[0].partition(" rises ")[0] for reason in report.within(Budget()).reasons] == [
        "KL to the adapter on general text",
        "loss on general text",
    ]


def test_what_is_not_a_number_is_never_within() -> None:
    broken = variant("merged", "dequantized", "bfloat16", loss=float("nan"), kl=float("nan"))
    report = replace(REPORT, variants=(REPORT.reference, broken))
    assert len(report.within(Budget(max_kl=1e9, max_loss_increase=1e9)).reasons) == 2


def test_a_loss_like_the_bases_has_lost_the_adapter() -> None:
    named = REPORT.named("merged, dequantized, nf4")
    assert named is not None
    assert lost(REPORT, named) == pytest.approx(0.95)


def test_the_advice_names_the_base_and_what_four_bits_cost() -> None:
    told = advice(REPORT)
    assert "Merged onto the dequantised NF4 base it is 0.0020 nats per token from the adapter" in told
    assert "Onto the original base it is 0.200 off, with the same loss on the task" in told
    assert told.endswith(
        "keeps 32.0% of the change from the dequantised NF4 base (1.500 off): four bits lose the adapter, keep 16."
    )
