"""The tensors of a planned merge, onto either base, as the fidelity report asks for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from adapters.base import WEIGHT
from adapters.errors import MergeError
from adapters.merge.apply import merged_tensor
from adapters.merge.bases import choose_base
from adapters.merge.named_tensors import Computed, NamedTensors
from adapters.merge.plan import Dtype, MergePlan, PlannedTensor, plan_merge
from adapters.merge.report import BASES

if TYPE_CHECKING:
    from torch import Tensor


class PlannedWeights:
    def __init__(self, plan: MergePlan) -> None:
        self._plans = dict(_plans(plan))
        self.path = plan.base.path
        self.bases = tuple(self._plans)
        self.linear = frozenset(module + WEIGHT for module in plan.base.modules)
        self.changed = tuple(each.name for each in plan.changed)
        self.config_changes: Mapping[str, Any] = plan.changes_config

    def base(self, which: str, dtype: Dtype = "float32") -> NamedTensors:
        plan = self._plans[which]
        return _tensors(plan, {each.name: replace(each, operation=None) for each in plan.planned}, dtype)

    def merged(self, which: str, dtype: Dtype = "float32") -> NamedTensors:
        plan = self._plans[which]
        return _tensors(plan, {each.name: each for each in plan.planned}, dtype)


def _tensors(plan: MergePlan, planned: Mapping[str, PlannedTensor], dtype: Dtype) -> NamedTensors:
    return Computed(planned, lambda name: _tensor(plan, planned[name], dtype))


def _tensor(plan: MergePlan, planned: PlannedTensor, dtype: Dtype) -> Tensor:
    """As it lies where nothing changes it and fp32 would say the same in twice the bytes."""
    lies_as = plan.weights.spans[planned.origin][1].dtype
    is_kept = planned.operation is None and not planned.decoded
    if is_kept and dtype == "float32" and lies_as in ("BF16", "F16"):
        return merged_tensor(plan, replace(planned, dtype=lies_as))
    return merged_tensor(plan, planned, dtype)


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
