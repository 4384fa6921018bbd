"""What is exported: a merged directory as it is, or an adapter, merged in fp32 into a scratch directory first."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from adapters.base import CONFIG, BaseModel
from adapters.base_weights import BaseWeights
from adapters.errors import NotExportable
from adapters.merge.apply import write_merged
from adapters.merge.bases import Asked, for_nf4
from adapters.merge.export.progress import Counter, Told
from adapters.merge.plan import MergePlan, plan_merge
from adapters.upload import CONFIG as ADAPTER_CONFIG


@dataclass(frozen=True)
class Merged:
    """In 16 or 32 bits."""

    model: BaseModel
    kept: Callable[[str], float | None]
    """What a format of adapters/merge/formats.py keeps of what the adapter changed: 1 is all of it. None: not known."""
    notes: tuple[str, ...] = ()


def is_adapter(source: Path) -> bool:
    return (source / ADAPTER_CONFIG).is_file()


def require_base(source: Path, base: Path | None) -> BaseModel:
    """Raises NotExportable where none is given."""
    if base is None:
        raise NotExportable(
            f"{source.name} is an adapter: give the base that it was trained on with --base", code="needs_base"
        )
    return BaseModel.read(base)


def merged(
    source: Path, base: Path | None, values: Asked, scratch: Path, told: Told, *, to_nf4: bool = False
) -> Merged:
    """Raises NotExportable for what is neither; InvalidAdapter and MergeError from merging."""
    if not is_adapter(source):
        _require_plain(source)
        return Merged(BaseModel.read(source), lambda stored: None)
    beneath = require_base(source, base)
    plan = plan_merge(source, beneath, for_nf4(beneath, values) if to_nf4 else values, "float32")
    write_merged(plan, scratch / "merged", Counter(told, "merging in fp32", plan.size_bytes))
    model = BaseModel.read(scratch / "merged")
    chosen = f"merged into the {plan.choice.values} values of the base: {plan.choice.reason}"
    return Merged(model, partial(_kept, plan, model, told), (chosen, *plan.notes))


def _kept(plan: MergePlan, model: BaseModel, told: Told, stored: str) -> float | None:
    """Of all that changes, by its size."""
    import torch

    from adapters.merge.formats import can_hold
    from adapters.merge.survival import change_of

    count = Counter(told, f"what {stored} keeps of the adapter", len(plan.changed))
    weights, linear = BaseWeights(model), {f"{module}.weight" for module in model.modules}
    size = kept = 0.0
    for each in plan.changed:
        before = torch.from_numpy(plan.weights.values(each.origin))
        after = torch.from_numpy(weights.values(each.name))
        format_ = stored if can_hold(stored, after, linear=each.name in linear) else "float16"
        if found := change_of(each.name, plan.choice.values, before, after, [format_]):
            size += found.size**2
            kept += found.size**2 * found.formats[format_].kept
        count(each.name, 1)
    return kept / size if size else None


def _require_plain(source: Path) -> None:
    if not (source / CONFIG).is_file():
        raise NotExportable(
            f"{source} is neither an adapter ({ADAPTER_CONFIG}) nor a model ({CONFIG}); give one of the two",
            code="no_source",
        )
    if "quantization_config" in json.loads((source / CONFIG).read_text(encoding="utf-8")):
        raise NotExportable(
            f"{source.name} is quantised already; export from the 16-bit merge, or from the adapter with --base",
            code="packed_model",
        )
