"""The values of one tensor of a safetensors file, as float32. Knows three types and no names."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import numpy.typing as npt

from adapters.safetensors_header import TensorSpan

Matrix = npt.NDArray[np.float32]
READABLE = ("F32", "F16", "BF16")


def read_values(path: Path, span: TensorSpan) -> Matrix:
    """Of the tensor's own shape. `span.dtype` must be READABLE."""
    assert span.dtype in READABLE, span.dtype
    count = math.prod(span.shape)
    with path.open("rb") as file:
        file.seek(span.offset)
        if span.dtype == "BF16":
            bits = np.fromfile(file, "<u2", count).astype("<u4") << 16
            return bits.view("<f4").reshape(span.shape)
        values = np.fromfile(file, "<f4" if span.dtype == "F32" else "<f2", count)
        return values.astype(np.float32, copy=False).reshape(span.shape)
