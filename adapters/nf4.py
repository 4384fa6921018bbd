"""NF4 as a format, and the two defects of bitsandbytes 0.50 around it on a CPU.

A weight of `shape` is read as one flat row of values: two 4-bit codes a byte (the high half first), and one float
scale (`absmax`) for every `blocksize` values, whatever the row length. The defects, both silent:

- The AVX512 `dequantize_4bit` starts a new block at every row, so a row length that is a multiple of 16 but not of
  the block size comes out wrong (relative error 0.2 to 0.4). `repair_dequantize` sends those shapes elsewhere.
- An `eval()` forward on a CPU with AVX512-BF16 repacks the weights in place into a layout that has no autograd and
  that merging misreads. `keep_unpacked` forbids it.

Knows nothing of vLLM or PEFT. torch and bitsandbytes are imported when a function runs, so importing this is cheap.
"""

from __future__ import annotations

import ctypes
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from adapters.errors import TrainError

if TYPE_CHECKING:
    import torch

# The 16 levels of NormalFloat4, from the QLoRA paper (appendix E): quantiles of N(0, 1) scaled to [-1, 1].
NF4_CODE = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)

TOLERANCE = 1e-2
"""Relative error above which a kernel is wrong: rounding to bfloat16 gives up to 0.004, the defect 0.2 and more."""

_SUSPECTS = (((16, 96), 64), ((16, 16), 64), ((16, 576), 128))
"""(shape, blocksize) where rows and blocks do not end together; if these are right there is nothing to repair."""

_library: Any = None
"""The torch library that holds our override: the override is undone when it is collected."""


@dataclass(frozen=True)
class Mismatch:
    """A layer shape whose weights bitsandbytes does not give back as the format says."""

    shape: tuple[int, ...]
    blocksize: int
    relative_error: float


def keep_unpacked(model: torch.nn.Module) -> int:
    """Forbid the in-place CPU repacking on every Linear4bit of `model`; how many there are.

    Call it before the first forward. Raises TrainError if a layer is packed already: its gradients would be wrong.
    """
    layers = [module for module in model.modules() if hasattr(module, "support_avx512bf16_for_cpu")]
    for layer in layers:
        if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
            raise TrainError(
                "an NF4 layer is already repacked for CPU inference, so gradients and merges would be wrong; "
                "load the base again and call keep_unpacked before the first forward",
                code="packed_weights",
            )
        layer.support_avx512bf16_for_cpu = False
    return len(layers)


def layer_shapes(model: torch.nn.Module) -> list[tuple[int, ...]]:
    """The distinct shapes of the 4-bit layers of `model`, for `self_test`."""
    states = (getattr(parameter, "quant_state", None) for parameter in model.parameters())
    return sorted({tuple(state.shape) for state in states if state is not None})


def reference_dequantize(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    code: torch.Tensor,
    blocksize: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> torch.Tensor:
    """The values of `packed`, by the definition of the format: code of each half byte times its block's absmax."""
    import torch

    count = math.prod(shape)
    code = code.float()
    pairs = torch.stack([code.repeat_interleave(16), code.repeat(16)], dim=1)  # byte -> (high half, low half)
    values = pairs.index_select(0, packed.reshape(-1).view(torch.uint8).int()).reshape(-1)[:count]
    whole = count - count % blocksize
    scales = absmax.reshape(-1).float()
    values[:whole].view(-1, blocksize).mul_(scales[: whole // blocksize, None])
    if whole < count:
        values[whole:].mul_(scales[whole // blocksize])
    return values.reshape(tuple(shape)).to(dtype)


def repair_dequantize() -> None:
    """Make bitsandbytes dequantise every 4-bit shape rightly on the CPU. Idempotent; nothing where it already does.

    The override sits on the torch operator, which is where functional.dequantize_4bit, gemm_4bit, gemv_4bit and the
    backward pass all arrive.
    """
    global _library
    if _library is not None or not any(self_test([shape], blocksize) for shape, blocksize in _SUSPECTS):
        return
    import torch

    _library = torch.library.Library("bitsandbytes", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch warns that a kernel is overridden: that is the point
        _library.impl("dequantize_4bit", _repaired_kernel(), "CPU", allow_override=True)


def self_test(shapes: Iterable[Sequence[int]], blocksize: int = 64) -> list[Mismatch]:
    """Quantise and dequantise random weights of each layer shape; the shapes that come back wrong (none: all well).

    Only as many rows as a defect needs to show are tried, so the shapes of a 7B model cost milliseconds.
    """
    with _plain_defaults():
        errors = {shape: _round_trip_error(shape, blocksize) for shape in {tuple(shape) for shape in shapes}}
    return [Mismatch(shape, blocksize, error) for shape, error in sorted(errors.items()) if error >= TOLERANCE]


def _repaired_kernel() -> Any:
    """The operator's new CPU kernel: each shape keeps the native code in the layout found right for it.

    Calling the native code directly rather than through torch costs no more than the kernel that is replaced.
    """
    import torch

    layouts: dict[tuple[Any, ...], tuple[int, int] | None] = {}

    def dequantize_4bit(
        packed: torch.Tensor,
        absmax: torch.Tensor,
        blocksize: int,
        quant_type: str,
        shape: Sequence[int],
        dtype: torch.dtype,
    ) -> torch.Tensor:
        key = (quant_type, dtype, blocksize, *shape)
        if key not in layouts:
            with _plain_defaults():
                layouts[key] = _right_layout(shape, blocksize, quant_type, dtype)
        layout = layouts[key]
        if layout is None:
            return reference_dequantize(packed, absmax, _code(quant_type), blocksize, shape, dtype)
        out = torch.empty(shape, dtype=dtype)
        _native(packed, absmax, out, layout, blocksize, quant_type)
        return out

    return dequantize_4bit


def _right_layout(shape: Sequence[int], blocksize: int, quant_type: str, dtype: torch.dtype) -> tuple[int, int] | None:
    """The (rows, columns) to tell the native code so that its answer is right; None if there is none.

    The values are one flat row to the format, so any factorisation of their number describes the same weight: the
    true one if that works, else one block a row, which is where the native code expects blocks to start.
    """
    count = math.prod(shape)
    layouts = [(math.prod(shape[:-1]), shape[-1])]
    if count % blocksize == 0:
        layouts.append((count // blocksize, blocksize))
    fits = (layout for layout in layouts if layout[1] % 2 == 0 and blocksize < 2048)  # bitsandbytes' own limits
    return next((layout for layout in fits if _is_right(layout, blocksize, quant_type, dtype)), None)


def _is_right(layout: tuple[int, int], blocksize: int, quant_type: str, dtype: torch.dtype) -> bool:
    """Try the native code on random codes. The scales have slack behind them: a wrong layout reads too far."""
    import torch

    rows, columns = _sample(layout, blocksize)
    generator = torch.Generator().manual_seed(0)
    packed = torch.randint(0, 256, (rows * columns // 2,), dtype=torch.uint8, generator=generator)
    absmax = torch.rand(rows * math.ceil(columns / blocksize), generator=generator)
    out = torch.empty((rows, columns), dtype=dtype)
    _native(packed, absmax, out, (rows, columns), blocksize, quant_type)
    code = _code(quant_type)
    expected = reference_dequantize(packed, absmax, code, blocksize, (rows, columns), torch.float32)
    return _relative_error(out, expected) < TOLERANCE


def _native(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    out: torch.Tensor,
    layout: tuple[int, int],
    blocksize: int,
    quant_type: str,
) -> None:
    """Call bitsandbytes' C code. The tensors stay referenced here until it returns."""
    import torch
    from bitsandbytes.cextension import lib

    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    function = getattr(lib, f"cdequantize_blockwise_cpu_{quant_type}_{names[out.dtype]}")
    packed, absmax = packed.contiguous(), absmax.float().contiguous()
    pointers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (packed, absmax, out))
    function(*pointers, *(ctypes.c_longlong(number) for number in (blocksize, *layout)))


def _round_trip_error(shape: Sequence[int], blocksize: int) -> float:
    """Relative error of bitsandbytes' dequantise after its own quantise, through its public functions."""
    import torch
    from bitsandbytes import functional

    sample = _sample(shape, blocksize)
    weight = torch.randn(sample, generator=torch.Generator().manual_seed(0))
    packed, state = functional.quantize_4bit(weight, blocksize=blocksize, quant_type="nf4")
    code = torch.tensor(NF4_CODE)
    expected = reference_dequantize(packed, state.absmax, code, blocksize, sample, torch.float32)
    return _relative_error(functional.dequantize_4bit(packed, state), expected)


def _sample(shape: Sequence[int], blocksize: int) -> tuple[int, int]:
    """`shape` with no more rows than a defect needs to show itself: four blocks and four rows."""
    return min(math.prod(shape[:-1]), max(4, math.ceil(4 * blocksize / shape[-1]))), shape[-1]


def _relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.float() - expected).norm() / expected.norm())


@cache
def _code(quant_type: str) -> torch.Tensor:
    import torch
    from bitsandbytes import functional

    with _plain_defaults():
        return torch.tensor(NF4_CODE) if quant_type == "nf4" else functional.get_4bit_type(quant_type, device="cpu")


@contextmanager
def _plain_defaults() -> Iterator[None]:
    """float32 on the CPU, whatever the caller made the default.

    Not only for our own tensors: bitsandbytes keeps the first code table it makes for the life of the process, so
    one quantisation inside vLLM's model construction, where the default is bfloat16, would round every later one.
    """
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(before)
