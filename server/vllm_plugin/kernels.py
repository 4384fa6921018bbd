"""Compiled by numba when the engine starts: what one layer with LoRA does to a few rows, in one call.

    add                y[row] += B[slot] · A[slot] · x[row]
    multiply_and_add   y = x · weightᵀ by bitsandbytes' packed kernel first, then the same

A decode step has few rows, so its LoRA is small products by the hundred, and most of their time goes into beginning
them. Here one call serves all slices of a layer and all rows of the batch, each row by its own slot's matrices, to the
rank that its adapter really has: an adapter of rank 4 in a slot for 16 costs a quarter, and a layer that it does not
change nothing. It reads bf16 as it lies and sums in fp32. It runs on one thread: for few rows, sharing out costs more.

numba is there wherever vLLM is: vLLM requires it. What it compiles is kept in `NUMBA_CACHE_DIR`, as of this file's time
and size: what is compiled in stands in one file, or the cache would not see it change. Importing this module takes a
second, so only `fused_lora` does, when a model is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba import typeof as numba_typeof
from numba.extending import intrinsic, overload

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

BLOCK = 8
"""Rows that share a slot and are computed side by side: a matrix is widened once for all of them."""

Decorator = Callable[[Callable[..., Any]], Any]

_instruction: Decorator = intrinsic
_compiled: Decorator = njit(
    fastmath={"contract", "reassoc", "nsz"},  # sums in any order; NaN and infinity stay what they are
    error_model="numpy",
    cache=True,
)


def layout(a: torch.Tensor, b: Sequence[torch.Tensor]) -> npt.NDArray[np.int64]:
    """Where a layer's matrices lie; for good. a [slots, slices * rank, in]; b [slots, rank, out], one a slice.

    [in, rank, slices, address of A; out, address of B, for each slice]
    """
    each_slice = [number for each in b for number in (each.shape[2], each.data_ptr())]
    return np.array([a.shape[2], b[0].shape[1], len(b), a.data_ptr(), *each_slice], dtype=np.int64)


def multiplies(rows: torch.dtype, matrices: torch.dtype) -> bool:
    """Whether rows of this type can be multiplied with matrices of that type."""
    return rows in _samples() and matrices in _samples()


def add(
    y: torch.Tensor,
    x: torch.Tensor,
    layer: npt.NDArray[np.int64],
    matrices: torch.dtype,
    ranks: npt.NDArray[np.int64],
    rows: npt.NDArray[np.int64],
) -> None:
    """y [n, sum of outs], x [n, in], of one type, neighbouring values in a row. `layer`: a `layout` of type `matrices`.

    ranks [slots, slices]: how much of each adapter is not zero. rows [m, 2]: row number and slot, ordered by slot.
    """
    samples = _samples()
    place = x.data_ptr(), x.stride(0), y.data_ptr(), y.stride(0), samples[x.dtype], samples[matrices]
    _add(layer, ranks, rows, *place)


def multiply_and_add(
    y: torch.Tensor,
    x: torch.Tensor,
    packed: npt.NDArray[np.int64],
    layer: npt.NDArray[np.int64],
    matrices: torch.dtype,
    ranks: npt.NDArray[np.int64],
    rows: npt.NDArray[np.int64],
) -> None:
    """The product with a weight first: `packed` is its `PackedWeight.layout`, x and y are bf16. Then `add`."""
    samples = _samples()
    place = x.data_ptr(), x.stride(0), y.data_ptr(), y.stride(0), samples[x.dtype], samples[matrices]
    _multiply_and_add(packed, y.shape[0], layer, ranks, rows, *place)


def find_ranks(layer: npt.NDArray[np.int64], matrices: torch.dtype, ranks: npt.NDArray[np.int64], slot: int) -> None:
    """Set ranks[slot] to what of the slot is not zero, each slice by itself: neither in A nor in B."""
    _find_ranks(layer, ranks, slot, _samples()[matrices])


def warm_up(rows: torch.dtype, matrices: torch.dtype) -> None:
    """Compile for these types, or read it from the cache, so that no request waits for it."""
    import torch

    signature = [types.int64[::1], types.int64[:, ::1], types.int64[:, ::1], *[types.int64] * 4]
    signature += [numba_typeof(_samples()[each]) for each in (rows, matrices)]
    _add.compile(tuple(signature))
    _find_ranks.compile((types.int64[::1], types.int64[:, ::1], types.int64, numba_typeof(_samples()[matrices])))
    if rows == torch.bfloat16:
        _multiply_and_add.compile((types.int64[::1], types.int64, *signature))


@cache
def _samples() -> dict[torch.dtype, npt.NDArray[Any]]:
    """An empty array for each type that can be read. numba has no bf16; its bits are the upper half of an fp32's."""
    import torch

    return {torch.bfloat16: np.empty(0, np.uint16), torch.float32: np.empty(0, np.float32)}


@_instruction
def _pointer(_: Any, __: Any, sample: Any) -> Any:
    """(address, sample) → a pointer to values of the sample's type."""
    found = types.CPointer(sample.dtype)

    def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(found))

    return found(types.int64, sample), generate


@_instruction
def _float(_: Any, __: Any) -> Any:
    """The fp32 of these 32 bits."""
    return types.float32(types.uint32), lambda _, builder, __, bits: builder.bitcast(bits[0], ir.FloatType())


@_instruction
def _bits(_: Any, __: Any) -> Any:
    """The 32 bits of this fp32."""
    return types.uint32(types.float32), lambda _, builder, __, value: builder.bitcast(value[0], ir.IntType(32))


@_instruction
def _multiply(
    _: Any,
    kernel: Any,
    count: Any,
    out: Any,
    width: Any,
    x: Any,
    codes: Any,
    scales: Any,
    y: Any,
    blocksize: Any,
    x_stride: Any,
    y_stride: Any,
) -> Any:
    """Call bitsandbytes' function at this address, see `packed_nf4`."""
    word = ir.IntType(64)

    def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        function = ir.FunctionType(ir.VoidType(), [word] * (len(arguments) - 1))
        builder.call(builder.inttoptr(arguments[0], function.as_pointer()), arguments[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 11), generate


def _wide(value: Any) -> Any:
    """A stored value as fp32."""


def _wide_of_type(value: Any) -> Any:
    if isinstance(value, types.Float):
        return lambda value: value
    return lambda value: _float(np.uint32(np.uint32(value) << np.uint32(16)))


def _narrow(value: Any, sample: Any) -> Any:
    """An fp32 as it is stored: to bf16 it is rounded to the nearest, to the even one between two."""


def _narrow_of_type(value: Any, sample: Any) -> Any:
    if isinstance(sample.dtype, types.Float):
        return lambda value, sample: value

    def narrow(value: Any, sample: Any) -> Any:
        bits = _bits(value)
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        return np.uint16(rounded) if value == value else np.uint16(0x7FC0)

    return narrow


for name, of_type in ((_wide, _wide_of_type), (_narrow, _narrow_of_type)):
    overload(name, inline="always", strict=False)(of_type)


# Each inner loop is a function of its own over arrays that begin at 0: only so does LLVM see that it can be vectorised.


@_compiled
def _widen(stored: Any, wide: Any) -> None:
    for column in range(stored.size):
        wide[column] = _wide(stored[column])


@_compiled
def _store(wide: Any, stored: Any, sample: Any) -> None:
    for column in range(stored.size):
        stored[column] = _narrow(wide[column], sample)


@_compiled
def _dot(row: Any, x: Any, width: Any) -> Any:
    total = np.float32(0)
    for column in range(width):
        total += row[column] * x[column]
    return total


@_compiled
def _add_row(y: Any, b: Any, hidden: Any) -> None:
    for column in range(b.size):
        y[column] += hidden * _wide(b[column])


@_compiled
def _add_four_rows(y: Any, b0: Any, b1: Any, b2: Any, b3: Any, hidden: Any) -> None:
    h0, h1, h2, h3 = hidden[0], hidden[1], hidden[2], hidden[3]
    for column in range(b0.size):
        y[column] += h0 * _wide(b0[column]) + h1 * _wide(b1[column]) + h2 * _wide(b2[column]) + h3 * _wide(b3[column])


@_compiled
def _array(address: Any, size: Any, sample: Any) -> Any:
    return carray(_pointer(address, sample), (size,))


@_compiled
def _add(
    layer: Any, ranks: Any, rows: Any, x: Any, x_stride: Any, y: Any, y_stride: Any, stored: Any, matrices: Any
) -> None:
    """`x` and `y` are addresses; `stored` and `matrices` samples of their types."""
    width, most, slices, a = layer[0], layer[1], layer[2], layer[3]
    inputs = np.empty((BLOCK, width), np.float32)
    hidden = np.empty((BLOCK, most), np.float32)
    factors = np.empty(width, np.float32)
    widest = 0
    for number in range(slices):
        widest = max(widest, layer[4 + 2 * number])
    sums = np.empty((BLOCK, widest), np.float32)

    start = 0
    while start < rows.shape[0]:
        slot = rows[start, 1]
        count = 1
        while count < BLOCK and start + count < rows.shape[0] and rows[start + count, 1] == slot:
            count += 1
        for each in range(count):
            _widen(_array(x + rows[start + each, 0] * x_stride * stored.itemsize, width, stored), inputs[each])

        first_column = 0
        for number in range(slices):
            out, b, rank = layer[4 + 2 * number], layer[5 + 2 * number], ranks[slot, number]
            if rank:
                row_of_a = a + (slot * slices + number) * most * width * matrices.itemsize
                for part in range(rank):
                    _widen(_array(row_of_a + part * width * matrices.itemsize, width, matrices), factors)
                    for each in range(count):
                        hidden[each, part] = _dot(factors, inputs[each], width)

                for each in range(count):
                    at = y + (rows[start + each, 0] * y_stride + first_column) * stored.itemsize
                    _widen(_array(at, out, stored), sums[each])
                row_of_b, length = b + slot * most * out * matrices.itemsize, out * matrices.itemsize
                part = 0
                while part + 4 <= rank:
                    b0 = _array(row_of_b + part * length, out, matrices)
                    b1 = _array(row_of_b + (part + 1) * length, out, matrices)
                    b2 = _array(row_of_b + (part + 2) * length, out, matrices)
                    b3 = _array(row_of_b + (part + 3) * length, out, matrices)
                    for each in range(count):
                        _add_four_rows(sums[each], b0, b1, b2, b3, hidden[each, part : part + 4])
                    part += 4
                while part < rank:
                    b0 = _array(row_of_b + part * length, out, matrices)
                    for each in range(count):
                        _add_row(sums[each], b0, hidden[each, part])
                    part += 1
                for each in range(count):
                    at = y + (rows[start + each, 0] * y_stride + first_column) * stored.itemsize
                    _store(sums[each], _array(at, out, stored), stored)
            first_column += out
        start += count


@_compiled
def _multiply_and_add(
    packed: Any,
    count: Any,
    layer: Any,
    ranks: Any,
    rows: Any,
    x: Any,
    x_stride: Any,
    y: Any,
    y_stride: Any,
    stored: Any,
    matrices: Any,
) -> None:
    kernel, out, width, codes, scales, blocksize = packed[0], packed[1], packed[2], packed[3], packed[4], packed[5]
    _multiply(kernel, count, out, width, x, codes, scales, y, blocksize, x_stride, y_stride)
    _add(layer, ranks, rows, x, x_stride, y, y_stride, stored, matrices)


@_compiled
def _is_zero(stored: Any) -> bool:
    zeros = True
    for column in range(stored.size):
        zeros &= _wide(stored[column]) == np.float32(0)  # NaN is not
    return zeros


@_compiled
def _find_ranks(layer: Any, ranks: Any, slot: Any, matrices: Any) -> None:
    width, most, slices, a = layer[0], layer[1], layer[2], layer[3]
    for number in range(slices):
        out, b = layer[4 + 2 * number], layer[5 + 2 * number]
        rank = most
        while rank > 0:
            row_of_a = ((slot * slices + number) * most + rank - 1) * width
            row_of_b = (slot * most + rank - 1) * out
            if not (
                _is_zero(_array(a + row_of_a * matrices.itemsize, width, matrices))
                and _is_zero(_array(b + row_of_b * matrices.itemsize, out, matrices))
            ):
                break
            rank -= 1
        ranks[slot, number] = rank
