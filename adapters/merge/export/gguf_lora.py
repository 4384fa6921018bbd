"""An adapter alone as a GGUF LoRA, which llama.cpp adds to its base's GGUF while it runs.

One alpha stands in the file and llama.cpp divides it by each module's rank: whatever else scales a module (rank and
alpha patterns, rsLoRA) is put into its B. Only plain LoRA has a place there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from adapters.base import WEIGHT, BaseModel
from adapters.errors import NotExportable
from adapters.lora_weights import Pair, read_pairs
from adapters.merge.export.gguf_decoder import Decoder, read_decoder
from adapters.merge.export.gguf_file import GgufTensor, OutType, Progress, type_for, write_gguf
from adapters.merge.export.gguf_model import FILE_TYPES, gguf_names
from adapters.merge.export.origin import Origin, describe
from adapters.peft_config import LoraConfig, read_config
from adapters.safetensors_header import TensorSpan
from adapters.tensor_values import READABLE, Matrix, read_values
from adapters.upload import CONFIG, WEIGHTS

if TYPE_CHECKING:
    from gguf import GGUFWriter

MAX_RANK = 1 << 16
"""llama.cpp has no limit of its own."""
LORA_TYPES: tuple[OutType, ...] = ("f32", "f16", "bf16")


@dataclass(frozen=True)
class LoraPlan:
    outtype: OutType
    decoder: Decoder
    alpha: float
    tensors: tuple[GgufTensor, ...]
    origin: Origin

    @property
    def size_bytes(self) -> int:
        return sum(tensor.size_bytes for tensor in self.tensors)


def plan_lora(adapter: Path, base: BaseModel, outtype: OutType, origin: Origin) -> LoraPlan:
    """Raises InvalidAdapter where it is no plain LoRA of this base, NotExportable where GGUF has no place for it."""
    if outtype not in LORA_TYPES:
        raise NotExportable(
            f"a LoRA's rows are too short for {outtype}; take --outtype {', '.join(LORA_TYPES)}", code="bad_outtype"
        )
    decoder, config = read_decoder(base.path), read_config(adapter / CONFIG, MAX_RANK)
    pairs = read_pairs(adapter / WEIGHTS, base)
    _require_known(pairs, decoder, config)
    named, path = gguf_names(decoder), adapter / WEIGHTS
    tensors = tuple(
        tensor
        for module, pair in pairs.items()
        for tensor in _tensors(path, module, pair, config, decoder, named(module + WEIGHT), outtype)
    )
    return LoraPlan(outtype, decoder, config.alpha, tensors, origin)


def write_lora(plan: LoraPlan, path: Path, progress: Progress = lambda name, size: None) -> None:
    write_gguf(path, plan.decoder.architecture.name, partial(_describe, plan), plan.tensors, progress)


def _describe(plan: LoraPlan, writer: GGUFWriter) -> None:
    from gguf import GGML_QUANT_VERSION, GGUFType, Keys, LlamaFileType

    writer.add_type(GGUFType.ADAPTER)
    writer.add_string(Keys.Adapter.TYPE, "lora")
    writer.add_float32(Keys.Adapter.LORA_ALPHA, plan.alpha)
    describe(writer, plan.origin)
    writer.add_file_type(LlamaFileType[FILE_TYPES[plan.outtype]])
    writer.add_quantization_version(GGML_QUANT_VERSION)


def _require_known(pairs: Mapping[str, Pair], decoder: Decoder, config: LoraConfig) -> None:
    shapes = decoder.tensors()
    for module, pair in pairs.items():
        expected, got = shapes.get(module + WEIGHT), (pair.b.shape[0], pair.a.shape[-1])
        if expected is None:
            raise NotExportable(
                f"llama.cpp has no tensor of {module}, which the adapter changes", code="unexpected_tensors"
            )
        if expected != got or not pair.a.shape[0] == pair.b.shape[-1] == config.rank_of(module):
            raise NotExportable(
                f"{module}: A is {pair.a.shape} and B {pair.b.shape}, for a weight of {expected} and by "
                f"{CONFIG} a rank of {config.rank_of(module)}",
                code="unexpected_tensors",
            )


def _tensors(
    path: Path, module: str, pair: Pair, config: LoraConfig, decoder: Decoder, name: str, outtype: OutType
) -> Iterator[GgufTensor]:
    rank = pair.a.shape[0]
    scaling = config.scaling_of(module)
    folded = scaling * rank / config.alpha if config.alpha else scaling
    for side, span in (("a", pair.a), ("b", pair.b)):
        if span.dtype not in READABLE:
            raise NotExportable(f"lora_{side.upper()} of {module} is {span.dtype}, which is not read here")
        values = partial(_a, path, span) if side == "a" else partial(_b, path, span, folded, decoder, module + WEIGHT)
        yield GgufTensor(f"{name}.lora_{side}", span.shape, type_for(span.shape, outtype), values)


def _a(path: Path, span: TensorSpan) -> Matrix:
    return read_values(path, span)


def _b(path: Path, span: TensorSpan, factor: float, decoder: Decoder, name: str) -> Matrix:
    values = read_values(path, span)
    if not math.isclose(factor, 1.0):
        values *= factor
    return decoder.interleaved(name, values)
