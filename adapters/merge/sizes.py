"""How much disk an export will take, estimated before anything is read but headers."""

from __future__ import annotations

import math
from collections.abc import Mapping

from adapters.base import PACKED_STATE, BaseModel
from adapters.base_weights import BaseWeights

BITS: Mapping[str | None, float] = {"bf16": 16, "f16": 16, "f32": 32, "q8_0": 8.5, "nf4": 4.2}
"""A weight in a file; NF4's constants and q8_0's scales are in it."""
SMALL_BYTES = 1 << 24
"""Tokenizer and documents."""


def parameters(base: BaseModel) -> int:
    spans = BaseWeights(base).spans
    packed = {name.partition(PACKED_STATE)[0] for name in spans if PACKED_STATE in name}
    modules = {f"{module}.weight": shape for module, shape in base.modules.items()}
    return sum(
        math.prod(modules.get(name, span.shape))
        for name, (_, span) in spans.items()
        if name in packed or not any(name.startswith(f"{each}.") for each in packed)
    )


def export_bytes(format_: str, outtype: str | None, count: int, adapter_bytes: int) -> int:
    """`count`: parameters of the base. NF4 is taken for all of them but what stays in 16 bits is unknown here: half as
    much again is added."""
    if format_ == "gguf-lora":
        return 2 * adapter_bytes + SMALL_BYTES
    bits = BITS["nf4"] * 1.5 if format_ == "nf4" else BITS[outtype]
    return int(count * bits / 8) + SMALL_BYTES


def work_bytes(format_: str, count: int) -> int:
    """Beside the export itself, while it is made: the merged model in fp32, of NF4 also in bf16; of a LoRA the base as
    f16, to try it on."""
    return {"hf": 0, "nf4": 6, "gguf": 4, "gguf-lora": 2}[format_] * count
