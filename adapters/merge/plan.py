"""FLOW merge, first: everything that a merge will do, tensor by tensor, checked from headers before a value is read.

It knows nothing of how files are written.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from adapters.base import PACKED_STATE, WEIGHT, BaseModel
from adapters.base_weights import BaseWeights
from adapters.convert.source import Source
from adapters.errors import MergeError, NotMergeable
from adapters.merge.bases import Asked, BaseChoice, Dequantized, choose_base, weights_of
from adapters.merge.embeddings import Ends, unties, widened
from adapters.merge.files import digest_of_adapter, prefix_of, require_same_base
from adapters.merge.operations import TOKENS, Operation, Operations, operations
from adapters.safetensors_header import BITS
from adapters.tokenizer_files import check_tokenizer

Dtype = Literal["bfloat16", "float16", "float32"]
DTYPES: tuple[Dtype, ...] = get_args(Dtype)
STORED = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
FLOATS = frozenset(("F64", "F32", "F16", "BF16"))
UNTIED = "embedding and head are one in the base and two in the result, for only one of them was trained"
CALCULATION = "merge-1"
"""Changes when the same plan would give other values: what another version left unfinished is begun anew."""


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the result."""

    name: str
    shard: str
    """The file that it goes to."""
    dtype: str
    """As safetensors spells it."""
    shape: tuple[int, ...]
    origin: str
    """The base's tensor that it begins with."""
    decoded: bool
    """Whether it begins with what NF4 leaves of that."""
    operation: Operation | None
    """None: nothing changes it."""

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * BITS[self.dtype] // 8


@dataclass(frozen=True)
class MergePlan:
    """Names, shapes and types are checked; values are read when they are called for."""

    adapter: Path
    adapter_digest: str
    base: BaseModel
    choice: BaseChoice
    dtype: Dtype
    kind: str
    """Of the adapter, in lower case."""
    planned: tuple[PlannedTensor, ...]
    """Shard by shard, in the order of the files."""
    notes: tuple[str, ...]
    """Worth telling a person."""
    weights: BaseWeights = field(repr=False, compare=False)
    """The values of the base that were chosen."""
    changes_config: dict[str, Any] = field(default_factory=dict)
    """What becomes different in config.json, beside the dtype."""

    @property
    def shards(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(each.shard for each in self.planned))

    def in_shard(self, shard: str) -> Iterator[PlannedTensor]:
        return (each for each in self.planned if each.shard == shard)

    @property
    def size_bytes(self) -> int:
        return sum(each.size_bytes for each in self.planned)

    @cached_property
    def changed(self) -> tuple[PlannedTensor, ...]:
        return tuple(each for each in self.planned if each.operation is not None)

    @cached_property
    def digest(self) -> str:
        """`sha256:<hex>`: two plans of one digest give the same files."""
        tensors = [
            [each.name, each.shard, each.dtype, each.shape, each.decoded, each.operation and each.operation.kind]
            for each in self.planned
        ]
        told = [CALCULATION, self.base.fingerprint, self.adapter_digest, self.choice.values, self.dtype, tensors]
        return f"sha256:{hashlib.sha256(json.dumps(told).encode()).hexdigest()}"


def plan_merge(
    adapter: Path, base: BaseModel, choice: Asked | BaseChoice = "auto", dtype: Dtype = "bfloat16"
) -> MergePlan:
    """Raises InvalidAdapter for a fault of the adapter, MergeError for what this base or this wish cannot have."""
    prefix = prefix_of(adapter)
    notes = [*require_same_base(adapter, base), *check_tokenizer(adapter, base.path)]
    if prefix:
        notes.append("its files are those that were sent, not the LoRA near them that is served")
    if not isinstance(choice, BaseChoice):
        choice = choose_base(adapter, base, choice)
    weights = weights_of(base, choice.values)
    source = Source.read(adapter, widened(base, weights), prefix, weights)
    kind, found = operations(source)
    planned = list(_planned(source, found, STORED[dtype]))
    two = unties(source, [name for name, each in found.items() if each.kind != TOKENS])
    _require_one_row(found, two)
    if two:
        planned += _untied(source, found, planned)
        notes.append(UNTIED)
    planned.sort(key=_place)
    return MergePlan(
        adapter=adapter,
        adapter_digest=digest_of_adapter(adapter),
        base=base,
        choice=choice,
        dtype=dtype,
        kind=kind,
        planned=tuple(planned),
        notes=tuple(notes),
        weights=weights,
        changes_config={"tie_word_embeddings": False} if two else {},
    )


def _place(planned: PlannedTensor) -> tuple[str, int]:
    """Wider types first in a shard, so that each tensor begins where its type may."""
    return planned.shard, -BITS[planned.dtype]


def _require_one_row(found: Operations, two: bool) -> None:
    if two and any(each.kind == TOKENS for each in found.values()):
        raise NotMergeable("it trains tokens and one of embedding and head, which are one here; train one of the two")


def _untied(source: Source, found: Operations, planned: Sequence[PlannedTensor]) -> Iterator[PlannedTensor]:
    """The head as a tensor of its own, where the base has none."""
    ends = Ends.of(source.base_weights)
    if ends.head not in source.base_weights.spans:
        embedding = next(each for each in planned if each.name == ends.embedding)
        yield replace(embedding, name=ends.head, operation=found.get(ends.head))


def _planned(source: Source, found: Operations, dtype: str) -> Iterator[PlannedTensor]:
    base = source.base
    spans = source.base_weights.spans
    packed = {name.partition(PACKED_STATE)[0] for name in spans if PACKED_STATE in name}
    beneath = source.weights_beneath
    for name, (shard, span) in spans.items():
        if name.partition(WEIGHT + ".")[0] + WEIGHT in packed and name not in packed:
            continue  # codes and scales of a packed weight; it comes out whole
        module = name.removesuffix(WEIGHT)
        linear = name.endswith(WEIGHT) and module in base.modules
        decoded = isinstance(beneath, Dequantized) and beneath.is_quantised(name)
        if not decoded and span.dtype not in FLOATS and name in found:
            raise MergeError(
                f"{name} is {span.dtype} in {base.name}, which nothing can be added to", code="packed_base"
            )
        yield PlannedTensor(
            name=name,
            shard=shard.name,
            dtype=dtype if decoded or span.dtype in FLOATS else span.dtype,
            shape=base.modules[module] if linear else span.shape,
            origin=name,
            decoded=decoded,
            operation=found.get(name),
        )
