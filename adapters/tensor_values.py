"""The values of one tensor of a safetensors file, as float32. Knows three types and no names."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from adapters.safetensors_header import TensorSpan

Matrix = npt.NDArray[np.float32]
READABLE = ("F32", "F16", "BF16")
PART = 1 << 22
"""Values that are read at once where the whole is not needed."""


def read_values(path: Path, span: TensorSpan) -> Matrix:
    """Of the tensor's own shape. `span.dtype` must be READABLE."""
    with path.open("rb") as file:
        file.seek(span.offset)
        return _read(file, span.dtype, math.prod(span.shape)).reshape(span.shape)


def read_in_parts(path: Path, span: TensorSpan) -> Iterator[Matrix]:
    """The same in a row, whatever its shape."""
    left = math.prod(span.shape)
    with path.open("rb") as file:
        file.seek(span.offset)
        while left:
            yield _read(file, span.dtype, min(PART, left))
            left -= min(PART, left)


def _read(file: BinaryIO, dtype: str, count: int) -> Matrix:
    assert dtype in READABLE, dtype
    if dtype == "BF16":
        return (np.fromfile(file, "<u2", count).astype("<u4") << 16).view("<f4")
    return np.fromfile(file, "<f4" if dtype == "F32" else "<f2", count).astype(np.float32, copy=False)
