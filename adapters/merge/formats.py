"""What weights become in each format that a merged model can be kept in: rounded, and given back as float32.

It knows no files. q8_0 is GGUF's: 32 values of a row share one fp16 scale.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from adapters.merge.bases import nf4_values
from adapters.merge.plan import Dtype
from adapters.nf4 import repair_dequantize

Q8_BLOCK = 32
Q8_LARGEST = 127


def bfloat16(weight: Tensor) -> Tensor:
    return weight.to(torch.bfloat16).float()


def float16(weight: Tensor) -> Tensor:
    return weight.to(torch.float16).float()


def q8_0(weight: Tensor) -> Tensor:
    """To the bit what ggml makes of it: codes by the scale before that is rounded itself, halves away from zero."""
    blocks = weight.float().reshape(-1, Q8_BLOCK)
    exact = blocks.abs().amax(dim=1, keepdim=True) / Q8_LARGEST
    scaled = blocks * torch.where(exact > 0, 1 / exact, 0)
    size = scaled.abs()
    codes = scaled.sign() * (size.floor() + (2 * size.frac()).floor())
    return (codes * exact.to(torch.float16).float()).reshape(weight.shape)


def nf4(weight: Tensor) -> Tensor:
    """Quantised from bf16, as bitsandbytes does it to a merged model when that is loaded."""
    repair_dequantize()
    return nf4_values(weight.to(torch.bfloat16))


FORMATS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "float32": lambda weight: weight.float(),
    "bfloat16": bfloat16,
    "float16": float16,
    "q8_0": q8_0,
    "nf4": nf4,
}
BESIDE: Mapping[str, Dtype] = {"nf4": "bfloat16", "q8_0": "float32"}
"""What stands beside them, for what they cannot hold."""
TARGETS = ("bfloat16", "float16", "q8_0", "nf4")
"""Those that survival is measured in."""


def can_hold(stored: str, weight: Tensor, *, linear: bool) -> bool:
    """NF4 is for linear weights; q8_0 for matrices whose rows are whole blocks."""
    if stored == "nf4":
        return linear
    return stored != "q8_0" or (weight.ndim == 2 and weight.shape[-1] % Q8_BLOCK == 0)
