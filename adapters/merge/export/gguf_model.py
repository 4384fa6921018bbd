"""FLOW: a merged Hugging Face directory into one GGUF file: plan every tensor, check every shape, then write."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.base import BaseModel
from adapters.base_weights import BaseWeights
from adapters.errors import NotExportable
from adapters.merge.export.gguf_decoder import Decoder, read_decoder, write_hyperparameters
from adapters.merge.export.gguf_file import GgufTensor, OutType, Progress, type_for, write_gguf
from adapters.merge.export.gguf_vocabulary import Vocabulary, read_vocabulary, write_vocabulary
from adapters.merge.export.origin import Origin, describe
from adapters.tensor_values import Matrix

if TYPE_CHECKING:
    from gguf import GGUFWriter

FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class GgufPlan:
    """Everything that will be written; the values are read when their turn comes."""

    outtype: OutType
    decoder: Decoder
    vocabulary: Vocabulary
    tensors: tuple[GgufTensor, ...]
    origin: Origin

    @property
    def size_bytes(self) -> int:
        return sum(tensor.size_bytes for tensor in self.tensors)

    @property
    def parameters(self) -> int:
        return sum(math.prod(tensor.shape) for tensor in self.tensors if tensor.name != ROPE_FACTORS)

    @property
    def notes(self) -> tuple[str, ...]:
        fallen = sum(1 for tensor in self.tensors if tensor.type == "F16" and self.outtype == "q8_0")
        rows = (f"{fallen} tensors stay f16: their rows are not whole blocks of 32",) if fallen else ()
        return (*self.decoder.notes, *self.vocabulary.notes, *rows)


def plan_gguf(model: BaseModel, outtype: OutType, origin: Origin) -> GgufPlan:
    """Raises NotExportable; reads headers, the configuration and the tokenizer."""
    decoder = read_decoder(model.path)
    tensors = tuple(_tensors(BaseWeights(model), decoder, outtype))
    return GgufPlan(outtype, decoder, read_vocabulary(model.path, decoder.vocabulary), tensors, origin)


def write_model(plan: GgufPlan, path: Path, progress: Progress = lambda name, size: None) -> None:
    write_gguf(path, plan.decoder.architecture.name, partial(_describe, plan), plan.tensors, progress)


def _describe(plan: GgufPlan, writer: GGUFWriter) -> None:
    from gguf import GGML_QUANT_VERSION, GGUFType, LlamaFileType, size_label

    writer.add_type(GGUFType.MODEL)
    describe(writer, plan.origin)
    writer.add_size_label(size_label(plan.parameters, 0, 0, 0))
    write_hyperparameters(writer, plan.decoder)
    write_vocabulary(writer, plan.vocabulary)
    writer.add_file_type(LlamaFileType[FILE_TYPES[plan.outtype]])
    writer.add_quantization_version(GGML_QUANT_VERSION)


def _tensors(weights: BaseWeights, decoder: Decoder, outtype: OutType) -> Sequence[GgufTensor]:
    expected = decoder.tensors()
    _require_expected(weights, expected, decoder)
    names = gguf_names(decoder)
    factors = decoder.rope_factors()
    extra = [] if factors is None else [GgufTensor(ROPE_FACTORS, factors.shape, "F32", lambda: factors)]
    return extra + [
        GgufTensor(names(name), shape, type_for(shape, outtype), partial(_values, weights, decoder, name))
        for name, shape in expected.items()
    ]


def _values(weights: BaseWeights, decoder: Decoder, name: str) -> Matrix:
    return decoder.interleaved(name, weights.values(name))


def gguf_names(decoder: Decoder) -> Any:
    """A function from transformers' name of a tensor to GGUF's."""
    import gguf

    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    known = gguf.get_tensor_name_map(kinds[decoder.architecture.name], decoder.layers)

    def named(name: str) -> str:
        found = known.get_name(name, try_suffixes=(".weight", ".bias"))
        assert found is not None, name
        return str(found)

    return named


def _require_expected(weights: BaseWeights, expected: Mapping[str, tuple[int, ...]], decoder: Decoder) -> None:
    spans = {name: span for name, (_, span) in weights.spans.items() if not _is_superfluous(name, decoder)}
    missing, unknown = expected.keys() - spans.keys(), spans.keys() - expected.keys()
    if missing or unknown:
        found = f"it has {sorted(unknown)[:3]}" if unknown else f"it has no {sorted(missing)[:3]}"
        raise NotExportable(
            f"its config.json describes another model than its tensors: {found}, which a "
            f"{decoder.architecture.name} of {decoder.layers} layers " + ("has not" if unknown else "has"),
            code="unexpected_tensors",
        )
    for name, shape in expected.items():
        if spans[name].shape != shape:
            raise NotExportable(
                f"{name} is {spans[name].shape}, by config.json it is {shape}", code="unexpected_tensors"
            )
        if not weights.is_plain(name):
            raise NotExportable(
                f"{name} is {spans[name].dtype}; give a model in 16 or 32 bits, not a quantised one",
                code="packed_model",
            )


def _is_superfluous(name: str, decoder: Decoder) -> bool:
    """A copy of the embedding, where that is the head; tables that are computed anew."""
    return (decoder.tied and name == "lm_head.weight") or name.endswith(".rotary_emb.inv_freq")
