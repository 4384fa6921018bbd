"""A model's directory with its weights in another type, or in NF4: what transformers and vLLM load.

One tensor is in memory at a time; NF4 takes a whole shard.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from adapters.base import CONFIG, INDEX, SINGLE, BaseModel, shards_of
from adapters.errors import NotExportable
from adapters.merge.documents import DTYPE_KEYS, EXPORT_RECORD, RECORD, SMALL, set_dtype
from adapters.merge.export.progress import Counter, Told
from adapters.merge.plan import FLOATS, STORED, Dtype
from adapters.merge.shard_file import Entry, write_shard
from adapters.merge.tensors import read_tensor, torch_types
from adapters.prequantized import can_be_prequantized, prequantize
from adapters.safetensors_header import BITS, TensorSpan, read_header

if TYPE_CHECKING:
    import torch


def write_plain(model: BaseModel, directory: Path, dtype: Dtype, told: Told) -> None:
    """Raises NotExportable for a value that the type cannot hold."""
    files = [(shard, read_header(shard)) for shard in shards_of(model.path)]
    total = sum(_entry(name, span, dtype).size_bytes for _, spans in files for name, span in spans.items())
    count = Counter(told, f"writing {dtype}", total)
    weight_map: dict[str, str] = {}
    for shard, spans in files:
        entries = [_entry(name, span, dtype) for name, span in spans.items()]
        entries.sort(key=lambda entry: -BITS[entry.dtype])  # so that each tensor begins where its type may
        write_shard(directory / shard.name, entries, _tensors(shard, spans, entries, count))
        weight_map |= dict.fromkeys(spans, shard.name)
    _write_small_files(model.path, directory, dtype)
    if [shard.name for shard, _ in files] != [SINGLE]:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def write_nf4(model: BaseModel, directory: Path, scratch: Path, told: Told) -> None:
    """Quantised from bfloat16, as vLLM and the server's base are. Raises NotExportable for fused experts."""
    rounded = scratch / "bfloat16"
    rounded.mkdir()
    write_plain(model, rounded, "bfloat16", told)
    plain = BaseModel.read(rounded)
    if not can_be_prequantized(plain):
        raise NotExportable(
            f"{model.name} has weights of three dimensions (fused experts), which bitsandbytes leaves as they are; "
            "export it with --format hf",
            code="fused_experts",
        )
    told("quantising to NF4", 0, 1)
    prequantize(plain, scratch / "nf4", quiet=True)
    for path in (scratch / "nf4").iterdir():
        path.rename(directory / path.name)
    shutil.rmtree(rounded)
    told("quantising to NF4", 1, 1)


def _tensors(
    shard: Path, spans: Mapping[str, TensorSpan], entries: Sequence[Entry], count: Counter
) -> Iterator[tuple[str, torch.Tensor]]:
    for entry in entries:
        yield entry.name, _rounded(entry, read_tensor(shard, spans[entry.name]))
        count(entry.name, entry.size_bytes)


def _entry(name: str, span: TensorSpan, dtype: Dtype) -> Entry:
    stored = STORED[dtype] if span.dtype in FLOATS else span.dtype
    return Entry(name, stored, span.shape, math.prod(span.shape) * BITS[stored] // 8)


def _rounded(entry: Entry, tensor: torch.Tensor) -> torch.Tensor:
    import torch

    found = tensor.to(torch_types()[entry.dtype])
    if not torch.isfinite(found).all():
        raise NotExportable(
            f"{entry.name} is not finite as {entry.dtype}: the values reach {float(tensor.abs().max()):g}; take "
            "--outtype bf16",
            code="value_too_large",
        )
    return found


def _write_small_files(source: Path, directory: Path, dtype: Dtype) -> None:
    for path in _small_files(source):
        shutil.copyfile(path, directory / path.name)
    config = json.loads((source / CONFIG).read_text(encoding="utf-8"))
    if not any(key in config for key in DTYPE_KEYS):
        config["dtype"] = dtype
    set_dtype(config, dtype)
    (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _small_files(source: Path) -> Iterator[Path]:
    """Tokenizer, chat template, generation configuration."""
    left_out = (CONFIG, INDEX, RECORD, EXPORT_RECORD)
    yield from (p for p in source.iterdir() if p.is_file() and p.suffix in SMALL and p.name not in left_out)
