"""Kinds that multiply weights, or add what has no low rank: no LoRA comes near, but they can be merged.

Their tensors are only compared with the base's names here; merging knows their formulas.
"""

from __future__ import annotations

from collections.abc import Mapping

from adapters.convert.plan import Plan
from adapters.convert.source import Source
from adapters.refusals import refuse

MULTIPLYING: Mapping[str, str] = {
    "IA3": "it scales rows or columns of the weights",
    "OFT": "it rotates the weights",
    "BOFT": "it rotates the weights",
    "HRA": "it reflects the weights",
    "FOURIERFT": "it adds waves to the weights",
}


def multiplying(source: Source) -> Plan:
    if not source.spans:
        raise refuse("no_modules", f"{source.weights.name} has no tensor for any module of {source.base.name}")
    for name in source.spans:
        if not any(name.startswith(module + ".") for module in _modules_above(name, source)):
            raise refuse("unknown_module", f"tensor {name[:200]!r} belongs to no linear module of {source.base.name}")
    if source.kind == "IA3":
        _require_vectors(source)
    return Plan(source.kind.lower(), merge_only=f"{MULTIPLYING[source.kind]}, which is not the sum of a low rank")


def _require_vectors(source: Source) -> None:
    for name, span in source.spans.items():
        module, _, part = name.rpartition(".")
        if part != "ia3_l" or module not in source.base.modules:
            raise refuse("unsupported_tensor", f"tensor {name[:200]!r} is not part of an IA3")
        rows, columns = source.base.modules[module]
        if span.shape not in ((rows, 1), (1, columns)):
            raise refuse("shape_mismatch", f"{module}: ia3_l is {span.shape}, expected {(rows, 1)} or {(1, columns)}")


def _modules_above(name: str, source: Source) -> list[str]:
    parts = name.split(".")
    return [above for end in range(1, len(parts)) if (above := ".".join(parts[:end])) in source.base.modules]
