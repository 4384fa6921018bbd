"""The tensors of a planned merge, onto either base, as the fidelity report asks for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from adapters.base import WEIGHT
from adapters.errors import MergeError
from adapters.merge.apply import merged_tensors
from adapters.merge.bases import choose_base
from adapters.merge.plan import MergePlan, plan_merge
from adapters.merge.report import BASES

if TYPE_CHECKING:
    from torch import Tensor


class PlannedWeights:
    def __init__(self, plan: MergePlan) -> None:
        self._plans = dict(_plans(plan))
        self.path = plan.base.path
        self.bases = tuple(self._plans)
        self.linear = frozenset(module + WEIGHT for module in plan.base.modules)
        self.count = len(plan.planned)
        self.config_changes: Mapping[str, Any] = plan.changes_config

    def base(self, which: str) -> Iterator[tuple[str, Tensor]]:
        plan = self._plans[which]
        untouched = tuple(replace(each, operation=None) for each in plan.planned)
        return merged_tensors(replace(plan, planned=untouched), dtype="float32")

    def merged(self, which: str) -> Iterator[tuple[str, Tensor]]:
        return merged_tensors(self._plans[which], dtype="float32")


def trained_on(plan: MergePlan) -> str:
    """One of BASES."""
    return choose_base(plan.adapter, plan.base).values


def _plans(plan: MergePlan) -> Iterator[tuple[str, MergePlan]]:
    for values in BASES:
        if values == plan.choice.values:
            yield values, plan
            continue
        try:
            yield values, plan_merge(plan.adapter, plan.base, values, plan.dtype)
        except MergeError as error:
            if error.code != "packed_base":
                raise
