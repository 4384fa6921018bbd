"""Adapters on the embedding and on the head, which no server swaps, and what becomes of a base where the two are one.

PEFT trains either of two tied matrices as if they were two: a merge that changed both would be another model. So the
one that was not trained stays what it was, as a tensor of its own, and config.json says that they are tied no more.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial

from adapters.base import WEIGHT, BaseModel
from adapters.base_weights import BaseWeights
from adapters.convert.change import Factors
from adapters.convert.lora import MAGNITUDE
from adapters.convert.source import Parts, Source, require_parts, require_shapes
from adapters.errors import NotMergeable
from adapters.peft_config import read_scaling
from adapters.refusals import refuse
from adapters.safetensors_header import TensorSpan

HEAD = "lm_head"
EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings")
PART = re.compile(r"(?P<module>.+)\.(?P<part>lora_embedding_[AB])")
A, B = "lora_embedding_A", "lora_embedding_B"
OF_BASE = f".base_layer{WEIGHT}"
"""Behind a module: the base's own, which PEFT saves beside an adapter on an end."""


@dataclass(frozen=True)
class Ends:
    """The base's embedding and head, by their tensors."""

    embedding: str
    """Empty: it has none, or several."""
    head: str = HEAD + WEIGHT
    tied: bool = False

    @classmethod
    def of(cls, weights: BaseWeights) -> Ends:
        found = [name for name in weights.spans if name.removesuffix(WEIGHT).rpartition(".")[2] in EMBEDDINGS]
        embedding = found[0] if len(found) == 1 else ""
        tied = bool(embedding) and (weights.ties_embeddings or HEAD + WEIGHT not in weights.spans)
        return cls(embedding, tied=tied)


def widened(base: BaseModel, weights: BaseWeights) -> BaseModel:
    """With the head among the modules that an adapter may be on."""
    ends = Ends.of(weights)
    name = ends.head if ends.head in weights.spans else ends.embedding if ends.tied else None
    shape = weights.spans[name][1].shape if name is not None else ()
    if len(shape) != 2:
        return base
    return replace(base, modules={**base.modules, HEAD: (shape[0], shape[1])})


@dataclass(frozen=True)
class OnEmbeddings:
    """What of the file belongs to embeddings, checked, and the rest."""

    rest: Source
    changes: Mapping[str, partial[Factors]]
    """By the embedding's module."""


def split(source: Source) -> OnEmbeddings:
    parts: dict[str, dict[str, TensorSpan]] = {}
    for name, span in source.spans.items():
        if (match := PART.fullmatch(name)) is not None:
            parts.setdefault(match["module"], {})[match["part"]] = span
    for module in parts:
        if f"{module}.{MAGNITUDE}" in source.spans:
            raise NotMergeable(
                f"DoRA on {module}, which is an embedding: train it without use_dora, or the others alone"
            )
        _require_pair(source, module, parts[module])
    rest = {name: span for name, span in source.spans.items() if not PART.fullmatch(name)}
    scaling = read_scaling(source.config, "lora_alpha") if parts else None
    changes = {
        module: partial(_change, source, found, scaling.scaling_of(module) if scaling else 1.0)
        for module, found in parts.items()
    }
    return OnEmbeddings(replace(source, spans=rest), changes)


def _require_pair(source: Source, module: str, parts: Parts) -> None:
    require_parts(module, parts, (A, B))
    name = module + WEIGHT
    if name not in source.base_weights.spans or name != Ends.of(source.base_weights).embedding:
        raise refuse("unknown_module", f"{module[:200]!r} is not the embedding of {source.base.name}")
    rows, columns = source.base_weights.spans[name][1].shape
    rank = read_scaling(source.config, "lora_alpha").rank_of(module)
    require_shapes(module, parts, {A: (rank, rows), B: (columns, rank)})


def _change(source: Source, parts: Parts, scale: float) -> Factors:
    """ΔW = s·(B·A)ᵀ, for an embedding has a row for each token."""
    return Factors((source.values(parts[A]) * scale).T.copy(), source.values(parts[B]).T.copy())


def unties(source: Source, changed: Collection[str]) -> bool:
    """Whether the result has two where the base has one. Raises NotMergeable where PEFT trained one LoRA for both."""
    ends = Ends.of(source.base_weights)
    if not ends.tied or (ends.embedding not in changed and ends.head not in changed):
        return False
    if not source.config.get("ensure_weight_tying"):
        return True
    if any(f"{end.removesuffix(WEIGHT)}.lora_" in name for end in (ends.embedding, ends.head) for name in source.spans):
        raise NotMergeable(
            "ensure_weight_tying is true: one LoRA for embedding and head, which PEFT applies to each in its own way; "
            "train without it, or with modules_to_save"
        )
    return False
