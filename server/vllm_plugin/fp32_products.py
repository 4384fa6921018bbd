"""Slow: on a CPU without bf16 instructions a bf16 matrix product is emulated, several times slower than in fp32.

Fix: there, 4-bit weights are dequantised to fp32 and multiplied in fp32, and the product is rounded to bf16 once.
That is also the more exact order. The override sits on the torch operator, where every 4-bit layer arrives.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@cache
def widen_products() -> Any:
    """Override `bitsandbytes::gemm_4bit` on the CPU where bf16 is emulated.

    Returns the torch library that holds the override, or None; the cache keeps it alive, and the override with it.
    """
    from adapters.processor import multiplies_bf16

    if multiplies_bf16():
        return None
    import torch

    library = torch.library.Library("bitsandbytes", "IMPL")
    library.impl("gemm_4bit", gemm_4bit, "CPU")
    return library


def gemm_4bit(
    rows: torch.Tensor,
    packed: torch.Tensor,
    shape: Sequence[int],
    absmax: torch.Tensor,
    blocksize: int,
    quant_type: str,
    bias: torch.Tensor | None = None,
    absmax_8bit: torch.Tensor | None = None,
    absmax_code: torch.Tensor | None = None,
    absmax_offset: torch.Tensor | None = None,
) -> torch.Tensor:
    """rows [..., in] · weightᵀ (+ bias) → [..., out], in the type of `rows`; `shape` is the weight's, (out, in).

    With `absmax_8bit` the scales are double-quantised (QLoRA, section 3): `absmax` holds the scales of their blocks.
    """
    import torch

    operators: Any = torch.ops.bitsandbytes
    if absmax_8bit is not None:
        scales = operators.dequantize_blockwise.default(absmax_8bit, absmax, absmax_code, 256, torch.float32)
        absmax = scales + absmax_offset
    weight = operators.dequantize_4bit.default(packed, absmax, blocksize, quant_type, shape, torch.float32)
    product = torch.nn.functional.linear(rows.float(), weight, None if bias is None else bias.float())
    return product.to(rows.dtype)
