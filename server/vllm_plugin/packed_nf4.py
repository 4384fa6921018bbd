"""Slow: on a CPU every 4-bit product first writes the whole weight out in bf16, for one token as for a thousand.

Faster: bitsandbytes has a kernel for processors with AVX512-BF16 that multiplies by the packed codes as they lie in
memory. It wants a layout of its own, which its `Linear4bit` makes and vLLM's layers do not: 32 rows are interleaved,
and scales are bf16, transposed. When a layer is loaded its weight is laid out so, all parts of it (q, k and v; gate and
up) as one, and the loaded copy is let go.

A layer is tried before it is used: on random rows it must agree with the dequantised weight up to bf16 rounding. One
that cannot be laid out, or that is computed wrongly, stays as it was loaded, and so does every layer on a processor
without the instructions.

A compiled model without LoRA (a merged one) is traced down to these layers. A kernel that is called by its address
cannot be: there it is an operator, which is given a layer's place in a list.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from server.vllm_plugin.patches import Patch

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

log = logging.getLogger(__name__)

_packed: list[PackedWeight] = []
"""Every packed weight of this process, for the operator: it takes numbers and tensors only."""

INTERLEAVED = 32
"""Rows of the weight that the kernel's layout holds side by side."""
TOLERANCE = 0.01
"""Relative error of a product (its norm over the exact one's): rounding gives 0.003, a wrong layout about 1."""
TRIED_ROWS = (1, 3, 40)
"""The kernel has paths of its own for one row, for few and for a block of 32."""


@dataclass(frozen=True)
class PackedWeight:
    """A weight [out, in] in the kernel's layout."""

    codes: torch.Tensor
    """uint8 [out, in / 2]"""
    scales: torch.Tensor
    """bf16 [in / blocksize, out]"""
    blocksize: int

    @property
    def layout(self) -> npt.NDArray[np.int64]:
        """[address of the kernel, out, in, address of the codes, of the scales, blocksize], for `kernels`."""
        function = ctypes.cast(_kernel(), ctypes.c_void_p).value
        out, half = self.codes.shape
        return np.array(
            [function, out, 2 * half, self.codes.data_ptr(), self.scales.data_ptr(), self.blocksize], dtype=np.int64
        )

    def __matmul__(self, rows: torch.Tensor) -> torch.Tensor:
        """weight · rowsᵀ, transposed back: rows [n, in] bf16 → [n, out] bf16."""
        import torch

        out = torch.empty((rows.shape[0], self.codes.shape[0]), dtype=torch.bfloat16)
        multiply(rows, self.codes, self.scales, self.blocksize, out)
        return out


def multiply(rows: Any, codes: Any, scales: Any, blocksize: int, out: Any) -> None:
    """out [n, out] = rows [n, in] · weightᵀ; all bf16, rows and out with whole rows of neighbouring values."""
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    count, width = rows.shape
    _kernel()(
        *(count, codes.shape[0], width),
        *(rows.data_ptr(), codes.data_ptr(), scales.data_ptr(), out.data_ptr()),
        *(blocksize, rows.stride(0), out.stride(0)),
    )


def pack(weight: torch.Tensor, states: Sequence[Any]) -> PackedWeight | None:
    """The parts of a layer, one below the other in `weight` with a state each; None if it cannot be laid out so."""
    import torch

    width, blocksize = states[0].shape[1], states[0].blocksize
    out = sum(state.shape[0] for state in states)
    alike = all((state.shape[1], state.blocksize, state.quant_type) == (width, blocksize, "nf4") for state in states)
    if not alike or out % INTERLEAVED or width % blocksize or width % 2 or weight.dtype != torch.uint8:
        return None
    scales = torch.cat([_scales(state).reshape(-1, width // blocksize) for state in states])
    return PackedWeight(interleave(weight.reshape(out, width // 2)), scales.t().bfloat16().contiguous(), blocksize)


def interleave(codes: torch.Tensor) -> torch.Tensor:
    """[out, in / 2], two neighbouring columns a byte (the first in the high half) → the kernel's order, same shape.

    A run of 32 bytes holds two columns of 32 rows: byte 2r + c has row r, column c in its low half and row r + 16 in
    its high one. What bitsandbytes' `_convert_weight_packed_for_cpu` does, without its copy in 32-bit integers.
    """
    import torch

    blocks = codes.view(-1, INTERLEAVED, codes.shape[1]).transpose(1, 2)
    low, high = blocks.chunk(2, dim=2)
    pairs = torch.stack(((high & 0xF0) | (low >> 4), (high << 4) | (low & 0x0F)), dim=3)
    return pairs.reshape(codes.shape)


def is_right(packed: PackedWeight, weight: torch.Tensor, states: Sequence[Any]) -> bool:
    """Whether products with random rows agree with the dequantised weight."""
    import torch
    from bitsandbytes.functional import dequantize_4bit

    sizes = [state.shape[0] * state.shape[1] // 2 for state in states]
    parts = zip(weight.reshape(-1).split(sizes), states, strict=True)
    exact = torch.cat([dequantize_4bit(part.unsqueeze(1), state).float() for part, state in parts])
    generator = torch.Generator().manual_seed(0)
    for count in TRIED_ROWS:
        rows = torch.randn(count, exact.shape[1], generator=generator).bfloat16()
        expected = rows.float() @ exact.t()
        if not (packed @ rows - expected).norm() <= TOLERANCE * expected.norm():  # not: NaN is wrong, too
            return False
    return True


def available() -> bool:
    """Whether this processor and this bitsandbytes have the kernel."""
    from bitsandbytes.functional import has_avx512bf16

    return bool(has_avx512bf16()) and _kernel() is not None


def process_weights_after_loading(stock: Callable[..., None]) -> Callable[..., None]:
    def process_weights_after_loading(self: Any, layer: Any) -> None:
        stock(self, layer)
        states = getattr(layer.weight, "bnb_quant_state", None)
        if not states or self.quant_config.load_in_8bit or not available():
            return
        import torch

        ordered = [states[number] for number in range(len(states))]
        packed = pack(layer.weight.data, ordered)
        if packed is None:
            return
        if not is_right(packed, layer.weight.data, ordered):
            log.warning("bitsandbytes' packed kernel is wrong for a layer, which stays slow: %s", layer)
            return
        operators()
        layer.packed_nf4, layer.packed_place = packed, len(_packed)
        _packed.append(packed)
        layer.weight.data = torch.empty(0, 1, dtype=torch.uint8)
        layer.weight.bnb_quant_state = {}

    return process_weights_after_loading


def apply_4bit_weight(stock: Callable[..., Any]) -> Callable[..., Any]:
    def apply_4bit_weight(self: Any, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        packed = getattr(layer, "packed_nf4", None)
        if packed is None:
            return stock(self, layer, x, bias)
        import torch

        rows = x.reshape(-1, x.shape[-1]).to(torch.bfloat16)
        if torch.compiler.is_compiling():
            product = torch.ops.loraplex_nf4.product(rows, layer.packed_place, packed.codes.shape[0])
        else:
            product = packed @ rows
        product = product.to(x.dtype).view(*x.shape[:-1], -1)
        return product if bias is None else product.add_(bias)

    return apply_4bit_weight


@cache
def operators() -> Any:
    """Register `loraplex_nf4::product`. It lives as long as the library returned."""
    import torch

    library = torch.library.Library("loraplex_nf4", "DEF")
    library.define("product(Tensor rows, int place, int out) -> Tensor")
    library.impl("product", lambda rows, place, _: _packed[place] @ rows, "CPU")
    library._register_fake("product", lambda rows, _, out: rows.new_empty((rows.shape[0], out)))
    return library


def _scales(state: Any) -> torch.Tensor:
    """float32, one a block; double-quantised ones (QLoRA, section 3) are unfolded."""
    from bitsandbytes.functional import dequantize_blockwise

    if not state.nested:
        return state.absmax.float()
    return (dequantize_blockwise(state.absmax, state.state2) + state.offset).float()


@cache
def _kernel() -> Any:
    from bitsandbytes.cextension import lib

    try:
        function = lib.gemv_4bit_inference_cpu_nf4_bf16
    except AttributeError:
        return None
    integer, pointer = ctypes.c_int64, ctypes.c_void_p
    function.argtypes = [*[integer] * 3, *[pointer] * 4, *[integer] * 3]
    function.restype = None
    return function


METHOD = "vllm_bnb_plugin.quantization.linear:BitsAndBytesLinearMethod"

PATCHES = (
    (
        Patch(METHOD, "process_weights_after_loading", ("self", "layer"), process_weights_after_loading),
        Patch(METHOD, "_apply_4bit_weight", ("self", "layer", "x", "bias"), apply_4bit_weight),
    )
    if find_spec("vllm_bnb_plugin")
    else ()
)
