"""A safetensors file written tensor by tensor: its header is known before any value is.

The library's own writer takes all tensors of a file at once. Knows no merge.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from adapters.merge.tensors import raw_bytes

if TYPE_CHECKING:
    import torch

ALIGNMENT = 8
PART = ".part"


@dataclass(frozen=True)
class Entry:
    name: str
    dtype: str
    shape: tuple[int, ...]
    size_bytes: int


def write_shard(path: Path, entries: Sequence[Entry], tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """The `sha256` hex of the file, which appears whole. `tensors`: those of `entries`, in their order."""
    header = _header(entries)
    running = hashlib.sha256(header)
    part = path.with_name(path.name + PART)
    with part.open("wb") as file:
        file.write(header)
        for entry, (name, tensor) in zip(entries, tensors, strict=True):
            raw = raw_bytes(tensor)
            assert (name, len(raw)) == (entry.name, entry.size_bytes), (name, len(raw), entry)
            file.write(raw)
            running.update(raw)
        file.flush()
        os.fsync(file.fileno())
    part.rename(path)
    return running.hexdigest()


def _header(entries: Sequence[Entry]) -> bytes:
    listed: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for entry in entries:
        end = position + entry.size_bytes
        listed[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [position, end]}
        position = end
    raw = json.dumps(listed, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % ALIGNMENT)
    return len(raw).to_bytes(8, "little") + raw
