"""Merges as others make them. `python -m loadtests.rivals.wrong_merges ADAPTER_DIR --base MODEL_DIR`

The right merge of a QLoRA adapter, and three onto values that it was not trained on: the original ones, those of NF4
with scales that are not quantised again (another flag than it was trained with), and those where every matrix went
through NF4, the embedding too, which bitsandbytes leaves alone. All in fp32, against the adapter on what it was
trained on.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table
from torch import Tensor

from adapters.base import BaseModel
from adapters.merge.bases import nf4_values
from adapters.merge.closeness import Reference
from adapters.merge.models import Loaded, Whole, log_probabilities
from adapters.merge.named_tensors import Computed, NamedTensors
from adapters.merge.plan import plan_merge
from adapters.merge.planned_weights import PlannedWeights
from adapters.merge.probes import Probes, gather
from adapters.merge.report import Closeness
from adapters.merge.variants import Variant, Weights
from adapters.nf4 import repair_dequantize
from adapters.train.allocator import map_large_tensors
from adapters.train.model import load_tokenizer
from adapters.train.quiet import quiet_libraries
from adapters.train.sections import ModelSection

TOKENS, WIDTH = 2048, 120
Values = Callable[[str, Tensor], Tensor]
"""A tensor of the original base by its name, as it is merged into."""


@dataclass(frozen=True)
class Row:
    name: str
    load: Callable[[], Loaded]


def rows(weights: Weights, adapter: Path) -> list[Row]:
    """The first is the reference."""

    def single_scales(name: str, tensor: Tensor) -> Tensor:
        return nf4_once(tensor) if name in weights.linear else tensor

    def every_matrix(name: str, tensor: Tensor) -> Tensor:
        return nf4_values(tensor.to(torch.bfloat16)) if tensor.ndim > 1 else tensor

    variants = (
        ("NF4 base + adapter", Variant("adapter", "dequantized", "float32")),
        ("merged, dequantised", Variant("merged", "dequantized", "float32")),
        ("merged, original", Variant("merged", "original", "float32")),
    )
    return [
        *(Row(name, partial(variant.load, Whole(), weights, adapter)) for name, variant in variants),
        Row("merged, scales of NF4 not quantised", partial(merged_into, weights, single_scales)),
        Row("merged, every matrix through NF4", partial(merged_into, weights, every_matrix)),
        Row("NF4 base alone", partial(Variant("base", "dequantized", "float32").load, Whole(), weights, adapter)),
    ]


def merged_into(weights: Weights, values: Values) -> Loaded:
    return Whole().of(weights.path, tensors_of(weights, values), torch.float32)


def tensors_of(weights: Weights, values: Values) -> NamedTensors:
    """The change is what the right merge adds to the values that are right."""
    original, before, after = weights.base("original"), weights.base("dequantized"), weights.merged("dequantized")
    return Computed(original, lambda name: values(name, original[name]) + (after[name] - before[name]))


def nf4_once(tensor: Tensor) -> Tensor:
    """Scales in fp32, which is bitsandbytes' default."""
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(tensor.to(torch.bfloat16), quant_type="nf4", compress_statistics=False)
    state.dtype = torch.float32
    found: Tensor = functional.dequantize_4bit(packed, state)
    return found


def measure(found: Sequence[Row], probes: Probes, pad: int) -> Iterator[tuple[str, Closeness, Closeness]]:
    with tempfile.TemporaryDirectory() as scratch:
        sets = ((probes.task, probes.task_tokens), (probes.general, probes.general_tokens))
        references = [Reference(Path(scratch) / str(place), tokens) for place, (_, tokens) in enumerate(sets)]
        for row in found:
            model = row.load()
            task, general = (
                reference.judge((said, tokens) for _, said, tokens in log_probabilities(model, {"": examples}, pad))
                for reference, (examples, _) in zip(references, sets, strict=True)
            )
            del model  # before the next one is there
            yield row.name, task, general


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtests.rivals.wrong_merges", description=__doc__)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--base", type=Path, required=True)
    arguments = parser.parse_args(argv)
    map_large_tensors()
    repair_dequantize()
    with quiet_libraries():
        base = BaseModel.read(arguments.base)
        weights = PlannedWeights(plan_merge(arguments.adapter, base, "dequantized", "float32"))
        tokenizer = load_tokenizer(ModelSection(model_name_or_path=base.path))
        probes = gather(arguments.adapter, tokenizer, TOKENS)
        table = Table("nats per token", "loss", "KL", "max |Δ|", "top 1", "general", "its KL", box=MARKDOWN)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        for name, task, general in measure(rows(weights, arguments.adapter), probes, pad):
            losses = [f"{figure:.4f}" for figure in (task.loss, task.kl, task.largest_change)]
            table.add_row(name, *losses, f"{task.same_top:.1%}", f"{general.loss:.4f}", f"{general.kl:.4f}")
    texts = f"{probes.task_tokens} tokens {probes.source}, {probes.general_tokens} of general text"
    Console(width=WIDTH).print(texts, table)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
