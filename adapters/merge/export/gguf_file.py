"""A GGUF file written tensor by tensor: one of them in memory at a time. Knows no model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from adapters.errors import NotExportable
from adapters.tensor_values import Matrix

if TYPE_CHECKING:
    from gguf import GGUFWriter

TensorType = Literal["F32", "F16", "BF16", "Q8_0"]
OutType = Literal["f32", "f16", "bf16", "q8_0"]
OUT_TYPES: tuple[OutType, ...] = get_args(OutType)
LARGEST = {"F16": 65504.0, "Q8_0": 65504.0 * 127}
"""q8_0 keeps a scale in fp16 for every 32 values, of which the largest is 127 times that."""
Q8_BLOCK = 32

Progress = Callable[[str, int], None]
"""Called with a tensor's name and its size in bytes, once it is done."""


@dataclass(frozen=True)
class GgufTensor:
    name: str
    shape: tuple[int, ...]
    """As torch has it; GGUF counts from the other end."""
    type: TensorType
    values: Callable[[], Matrix] = field(repr=False, compare=False)

    @property
    def size_bytes(self) -> int:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[self.type]]
        return int(math.prod(self.shape) // block * block_bytes)


def type_for(shape: Sequence[int], outtype: OutType) -> TensorType:
    """llama.cpp computes with vectors in fp32; rows that are no whole number of blocks cannot be q8_0."""
    if len(shape) < 2:
        return "F32"
    if outtype == "q8_0" and shape[-1] % Q8_BLOCK:
        return "F16"
    types: dict[OutType, TensorType] = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}
    return types[outtype]


def write_gguf(
    path: Path,
    architecture: str,
    describe: Callable[[GGUFWriter], None],
    tensors: Sequence[GgufTensor],
    progress: Progress = lambda name, size: None,
) -> None:
    """`describe` adds the metadata. Raises NotExportable where a value does not fit its type."""
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(path, architecture)
    try:
        describe(writer)
        for tensor in tensors:
            kind = GGMLQuantizationType[tensor.type]
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.size_bytes, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            _write_tensor(writer, tensor)
            progress(tensor.name, tensor.size_bytes)
    finally:
        writer.close()


def _write_tensor(writer: GGUFWriter, tensor: GgufTensor) -> None:
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    values = tensor.values()
    assert values.shape == tensor.shape, (tensor, values.shape)
    _require_fit(tensor, values)
    writer.write_tensor_data(quantize(values, GGMLQuantizationType[tensor.type]))


def _require_fit(tensor: GgufTensor, values: Matrix) -> None:
    largest = float(max(values.max(), -values.min()))
    if not largest <= LARGEST.get(tensor.type, np.finfo(np.float32).max):
        raise NotExportable(
            f"{tensor.name} has the value {largest:g}, which {tensor.type} cannot hold; take --outtype bf16 or f32",
            code="value_too_large",
        )
