"""adapter_model.safetensors as pairs of matrices: names, shapes and values. Reads no configuration."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from adapters.base import NOT_LINEAR, BaseModel
from adapters.errors import InvalidAdapter
from adapters.refusals import refuse
from adapters.safetensors_header import BadHeader, TensorSpan, read_header

NAME = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
TELLING = {
    "lora_magnitude_vector": "dora",
    "lora_B.bias": "lora_bias",
    "modules_to_save": "modules_to_save",
    "token_adapter": "trainable_tokens",
    "embed": "unsupported_module",
    "lm_head": "unsupported_module",
}
"""Parts of tensor names that tell why it is not a plain LoRA; the first one counts."""
MOST_HEADER_BYTES = 16 << 20
HEADER_BYTES_A_MODULE = 4096
"""Room for eight tensors of long names; read into objects, a header takes many times its size."""
CHUNK_ELEMENTS = 1 << 21
EXPONENT = {"F32": 0x7F800000, "F16": 0x7C00, "BF16": 0x7F80}
"""As an unsigned integer without its sign, a number is finite exactly when it is below this: the exponent all ones."""


@dataclass(frozen=True)
class Pair:
    """The two matrices of one module."""

    a: TensorSpan
    """(rank, in_features)"""
    b: TensorSpan
    """(out_features, rank)"""


def read_pairs(path: Path, base: BaseModel) -> Mapping[str, Pair]:
    """Module → its pair; every module is one of the base's."""
    sides: dict[str, dict[str, TensorSpan]] = {}
    for name, span in read_spans(path, base).items():
        module, side = _parse(name, base)
        if span.dtype not in EXPONENT:
            raise refuse("unsupported_dtype", f"{name} is {span.dtype}")
        if sides.setdefault(module, {}).setdefault(side, span) is not span:
            raise refuse(
                "unsupported_tensor", f"{module} has two lora_{side} tensors, with and without base_model.model."
            )
    if not sides:
        raise refuse("no_modules", f"{path.name} has no tensor for any module of {base.name}")
    return {module: _pair(module, found) for module, found in sorted(sides.items())}


def read_spans(path: Path, base: BaseModel | None = None) -> Mapping[str, TensorSpan]:
    """Of every tensor in the file, no more of them than modules of the base can carry. Raises InvalidAdapter where it
    is damaged."""
    room = HEADER_BYTES_A_MODULE * len(base.modules) if base else MOST_HEADER_BYTES
    try:
        return read_header(path, max_header_bytes=min(max(room, 1 << 20), MOST_HEADER_BYTES))
    except BadHeader as error:
        raise refuse("bad_safetensors", f"{path.name}: {error}") from error


def _parse(name: str, base: BaseModel) -> tuple[str, str]:
    match = NAME.fullmatch(name)
    if match is None:
        raise not_a_lora_tensor(name)
    require_lora_module(match["module"], base)
    return match["module"], match["side"]


def require_lora_module(module: str, base: BaseModel) -> None:
    if module not in base.modules:
        last = module.rpartition(".")[2]
        code = "unsupported_module" if any(part in last for part in NOT_LINEAR) else "unknown_module"
        raise refuse(code, f"{module[:200]!r} is not a linear module of {base.name} that can carry a LoRA")


def not_a_lora_tensor(name: str) -> InvalidAdapter:
    code = next((code for part, code in TELLING.items() if part in name), "unsupported_tensor")
    return refuse(code, f"tensor {name[:200]!r} is not part of a plain LoRA")


def _pair(module: str, found: Mapping[str, TensorSpan]) -> Pair:
    if len(found) < 2:
        raise refuse("unpaired", f"{module} has only lora_{next(iter(found))}")
    return Pair(a=found["A"], b=found["B"])


def largest_magnitude(path: Path, span: TensorSpan) -> float:
    """Of all values of the tensor; `inf` when one of them is infinite or not a number."""
    limit = EXPONENT[span.dtype]
    with path.open("rb") as file:
        bits = max(_magnitude_bits(file, span, limit), default=0)
    return math.inf if bits >= limit else _value_of(bits, span.dtype)


def _magnitude_bits(file: BinaryIO, span: TensorSpan, limit: int) -> Iterator[int]:
    """Without their signs, floating-point numbers sort like the integers with the same bits."""
    word = np.dtype("<u4" if span.dtype == "F32" else "<u2")
    unsigned = word.type(0x7FFFFFFF if span.dtype == "F32" else 0x7FFF)
    left = span.size_bytes // word.itemsize
    file.seek(span.offset)
    while left:
        chunk = np.fromfile(file, dtype=word, count=min(CHUNK_ELEMENTS, left))
        left -= len(chunk)
        yield int((chunk & unsigned).max())


def _value_of(bits: int, dtype: str) -> float:
    if dtype == "F16":
        return float(np.array(bits, "<u2").view("<f2"))
    return float(np.array(bits << 16 if dtype == "BF16" else bits, "<u4").view("<f4"))
