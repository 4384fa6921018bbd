"""Single tensors between a safetensors file and torch, without a map of the whole file."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from adapters.safetensors_header import TensorSpan

if TYPE_CHECKING:
    import torch


@cache
def torch_types() -> Mapping[str, torch.dtype]:
    """By the name that safetensors gives them."""
    import torch

    return {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U8": torch.uint8,
        "BOOL": torch.bool,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
    }


def read_tensor(path: Path, span: TensorSpan) -> torch.Tensor:
    """As it lies."""
    import torch

    raw = np.fromfile(path, np.uint8, span.size_bytes, offset=span.offset)
    if len(raw) < span.size_bytes:
        raise OSError(f"{path} became shorter while it was read")
    return torch.from_numpy(raw).view(torch_types()[span.dtype]).reshape(span.shape)


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    import torch

    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
