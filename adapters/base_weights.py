"""The base's own tensors, by name: what some adapters are defined by, or repeat. Read one at a time, as float32.

It reads plain checkpoints; of a pre-quantised one it gives what is not packed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path

from adapters.base import CONFIG, WEIGHT, BaseModel, shards_of
from adapters.safetensors_header import TensorSpan, read_header
from adapters.tensor_values import READABLE, Matrix, read_in_parts, read_values


class BaseWeights:
    def __init__(self, base: BaseModel) -> None:
        self._base = base

    @cached_property
    def spans(self) -> Mapping[str, tuple[Path, TensorSpan]]:
        """Tensor name → its file and place."""
        return {
            name: (shard, span) for shard in shards_of(self._base.path) for name, span in read_header(shard).items()
        }

    @cached_property
    def ties_embeddings(self) -> bool:
        """Whether the output head is the embedding itself."""
        config = json.loads((self._base.path / CONFIG).read_text(encoding="utf-8"))
        return bool(config.get("tie_word_embeddings", False))

    def is_plain(self, tensor: str) -> bool:
        return tensor in self.spans and self.spans[tensor][1].dtype in READABLE

    def values(self, tensor: str) -> Matrix:
        """Ask `is_plain` first."""
        return read_values(*self.spans[tensor])

    def parts(self, tensor: str) -> Iterator[Matrix]:
        """All values in a row, as they lie; ask `is_plain` first."""
        return read_in_parts(*self.spans[tensor])

    def weight(self, module: str) -> Matrix:
        """[out_features, in_features] of a linear module."""
        return self.values(module + WEIGHT)
