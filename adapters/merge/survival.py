"""How much of an adapter's change of the weights is left in each format, tensor by tensor: two are held at once.

A change that is smaller than the steps of a format does not cross them: of a change of 1 % on an NF4 base, NF4 keeps
1.5 %. Nothing here runs a model.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Iterator, Sequence

from torch import Tensor

from adapters.merge.formats import FORMATS, TARGETS, can_hold
from adapters.merge.named_tensors import NamedTensors
from adapters.merge.report import FormatReport, ModuleReport, Survival


def changes(
    which: str,
    base: NamedTensors,
    merged: NamedTensors,
    names: Sequence[str],
    linear: Collection[str],
    targets: Sequence[str] = TARGETS,
    heard: Callable[[int, int], None] = lambda done, of: None,
) -> Iterator[ModuleReport]:
    """Of the tensors `names`, before rounding. `linear`: names of the weights that NF4 packs."""
    for number, name in enumerate(names, start=1):
        before, after = base[name], merged[name]
        fitting = [stored for stored in targets if can_hold(stored, after, linear=name in linear)]
        report = change_of(name, which, before.float(), after.float(), fitting)
        heard(number, len(names))
        if report is not None:
            yield report


def summed(modules: Sequence[ModuleReport]) -> Iterator[FormatReport]:
    """Base by base, each tensor with the weight of its change."""
    for base in dict.fromkeys(module.base for module in modules):
        for stored in TARGETS:
            held = [each for each in modules if each.base == base and stored in each.formats]
            if held:
                kept = [each.formats[stored].kept for each in held]
                sizes = [each.size**2 for each in held]
                noise = statistics.median(each.formats[stored].error for each in held)
                yield FormatReport(base, stored, _mean(kept, sizes), min(kept), noise)


def _mean(values: Sequence[float], weights: Sequence[float]) -> float:
    return sum(value * weight for value, weight in zip(values, weights, strict=True)) / sum(weights)


def change_of(name: str, which: str, before: Tensor, after: Tensor, targets: Sequence[str]) -> ModuleReport | None:
    """None where nothing changes."""
    change = after - before
    size, whole = float(change.norm()), float(before.norm())
    if size == 0:
        return None
    formats = {stored: survival(stored, before, after, change) for stored in targets}
    return ModuleReport(name, which, size, size / whole if whole else 0.0, formats)


def survival(stored: str, before: Tensor, after: Tensor, change: Tensor) -> Survival:
    base, merged = FORMATS[stored](before), FORMATS[stored](after)
    squared = float((change * change).sum())
    kept = float(((merged - base) * change).sum()) / squared
    return Survival(kept, float((merged - after).norm()) / squared**0.5)
