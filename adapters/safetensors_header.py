"""Reads the header of a safetensors file and proves that it describes exactly the bytes of that file.

At least as strict as the safetensors library: what passes here, it opens. It reads no tensor data and does not know
what the tensors are for.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
BITS = {
    "F4": 4,
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E5M2FNUZ", "F8_E4M3FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}


MAX_DIMENSIONS = 8
"""No layer has more; multiplying a few hundred thousand of them holds the interpreter for minutes."""


class BadHeader(ValueError):
    """The file is not a whole safetensors file; the message says where it goes wrong."""


@dataclass(frozen=True)
class TensorSpan:
    """Where one tensor lies."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    """From the start of the file, in bytes."""
    size_bytes: int


def read_header(path: Path, *, max_header_bytes: int = MAX_HEADER_BYTES) -> Mapping[str, TensorSpan]:
    """Tensor name → span, in file order. Raises BadHeader."""
    file_bytes = path.stat().st_size
    with path.open("rb") as file:
        header_bytes = _header_bytes(file.read(LENGTH_BYTES), file_bytes, max_header_bytes)
        entries = _parse(file.read(header_bytes))
    data_start = LENGTH_BYTES + header_bytes
    spans = {name: _span(name, entry, data_start) for name, entry in entries.items()}
    _require_full_cover(spans, data_start, file_bytes)
    return dict(sorted(spans.items(), key=lambda item: item[1].offset))


def _header_bytes(prefix: bytes, file_bytes: int, limit: int) -> int:
    if len(prefix) < LENGTH_BYTES:
        raise BadHeader(f"the file has {file_bytes} bytes, too few for a safetensors header")
    length = int.from_bytes(prefix, "little")
    if length > limit:
        raise BadHeader(f"the header claims {length} bytes, at most {limit} are allowed")
    if LENGTH_BYTES + length > file_bytes:
        raise BadHeader(f"the header claims {length} bytes, but the file ends after {file_bytes}")
    return length


def _parse(raw: bytes) -> dict[str, Any]:
    try:
        header = json.loads(
            raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant, parse_int=_whole_number
        )
        json.dumps(header, ensure_ascii=False).encode()  # lone surrogates end here
    except (ValueError, RecursionError) as error:
        raise BadHeader(f"the header is not valid JSON: {error}") from error
    if not raw.startswith(b"{") or not isinstance(header, dict):
        raise BadHeader("the header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise BadHeader("__metadata__ must map strings to strings")
    return header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise BadHeader("a name occurs twice in the header")
    return entries


def _no_constant(name: str) -> None:
    raise BadHeader(f"{name} is not JSON")


def _whole_number(digits: str) -> int:
    if digits == "-0":  # 0 to Python, a fraction to the safetensors library
        raise BadHeader("-0 is no whole number")
    return int(digits)


def _span(name: str, entry: Any, data_start: int) -> TensorSpan:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise BadHeader(f"tensor {_shown(name)}: expected exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise BadHeader(f"tensor {_shown(name)}: unknown dtype {_shown(dtype)}")
    if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
        raise BadHeader(
            f"tensor {_shown(name)}: shape and data_offsets must be lists of whole numbers, shape of at most "
            f"{MAX_DIMENSIONS}"
        )
    begin, end = offsets
    bits = math.prod(shape) * BITS[dtype]
    if bits != (end - begin) * 8 or math.prod(size or 1 for size in shape) >= 2**60:
        raise BadHeader(
            f"tensor {_shown(name)}: {dtype} {shape} takes {bits / 8:g} bytes, the offsets span {end - begin}"
        )
    return TensorSpan(dtype, tuple(shape), data_start + begin, end - begin)


def _are_counts(values: Any) -> bool:
    return (
        isinstance(values, list)
        and len(values) <= MAX_DIMENSIONS
        and all(type(value) is int and 0 <= value < 2**63 for value in values)
    )


def _shown(value: object) -> str:
    return ascii(value)[:200]


def _require_full_cover(spans: Mapping[str, TensorSpan], data_start: int, file_bytes: int) -> None:
    """No gap, no overlap, nothing behind the last tensor."""
    expected = data_start
    for name, span in sorted(spans.items(), key=lambda item: (item[1].offset, item[1].size_bytes)):
        if span.offset != expected:
            raise BadHeader(
                f"tensor {_shown(name)} starts at byte {span.offset}, expected {expected}: a gap or an overlap"
            )
        expected += span.size_bytes
    if expected != file_bytes:
        raise BadHeader(f"the tensors end at byte {expected}, the file at {file_bytes}: truncated or padded")


def read_bytes(path: Path, span: TensorSpan) -> bytes:
    """The raw bytes of one small tensor."""
    with path.open("rb") as file:
        return os.pread(file.fileno(), span.size_bytes, span.offset)
