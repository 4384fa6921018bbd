"""FLOW verify: texts → the adapter path as reference → every variant against it → what each format keeps → a report.

One model is computed at a time, layer by layer, so that one layer is in memory; whole where it is of no such shape.
What the reference says of each token lies on disk meanwhile.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path

from adapters.merge.closeness import Reference, judged
from adapters.merge.formats import TARGETS
from adapters.merge.layers import LayerByLayer, NotInLayers
from adapters.merge.models import Loading, Whole, log_probabilities
from adapters.merge.probes import Probes, gather
from adapters.merge.report import (
    BASES,
    Closeness,
    Cost,
    FidelityReport,
    ModuleReport,
    Told,
    VariantReport,
    name_of,
)
from adapters.merge.survival import changes, summed
from adapters.merge.variants import Variant, Weights, variants
from adapters.train.allocator import map_large_tensors
from adapters.train.model import load_tokenizer
from adapters.train.quiet import quiet_libraries
from adapters.train.sections import ModelSection


@dataclass(frozen=True)
class Asked:
    adapter: Path
    trained_on: str
    onto: str
    """The base that it is merged onto: one of report.BASES, as `trained_on` is."""
    stored: str = "bfloat16"
    """The format that is wanted."""
    data: tuple[Path, ...] = ()
    """Files of the task; without them, what the adapter held out, or chats of our own."""
    general: Path | None = None
    tokens: int = 2048
    """Of the task; half as many of general text."""
    written: Path | None = None
    """The directory of the merge, where it is written: its files are what is judged."""
    written_as: str = "bfloat16"
    """The type of their weights; they are judged as they become in the format that is wanted."""

    @property
    def judged(self) -> str:
        return name_of("merged", self.onto, self.stored)


def measure(asked: Asked, weights: Weights, told: Told = lambda what, done, of: None) -> FidelityReport:
    """Raises DataError for texts, MergeError for weights that are no model."""
    map_large_tensors()
    with quiet_libraries():
        tokenizer = load_tokenizer(ModelSection(model_name_or_path=weights.path))
        probes = gather(asked.adapter, tokenizer, asked.tokens, asked.data, asked.general)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        wanted = variants(asked.trained_on, weights.bases, asked.onto, asked.stored)
        progress = _Progress(told, len(wanted) * probes.tokens + len(weights.bases) * len(weights.changed))
        compared, costs, whole = _compared(wanted, asked, weights, probes, pad, progress)
        modules = _modules(asked, weights, progress)
    return FidelityReport(
        adapter=asked.adapter.resolve().name,
        base=weights.path.resolve().name,
        trained_on=asked.trained_on,
        judged=asked.judged,
        probes=probes.source,
        task_tokens=probes.task_tokens,
        general_tokens=probes.general_tokens,
        variants=compared,
        formats=tuple(summed(modules)),
        nf4_costs=costs,
        modules=modules,
        whole=whole,
    )


class _Progress:
    def __init__(self, told: Told, of: int) -> None:
        self._told, self._of, self._before, self._size, self._what = told, of, 0, 0, ""

    def begin(self, what: str, size: int) -> None:
        """The next part of the whole."""
        self._before += self._size
        self._what, self._size = what, size
        self.heard(0, 1)

    def heard(self, done: int, of: int) -> None:
        """Of this part, in units of its own."""
        self._told(self._what, self._before + self._size * done // of, self._of)

    def begin_again(self) -> None:
        self._before = self._size = 0


def _compared(
    wanted: list[Variant], asked: Asked, weights: Weights, probes: Probes, pad: int, progress: _Progress
) -> tuple[tuple[VariantReport, ...], Mapping[str, Cost], str]:
    """And what NF4 costs the base itself, where NF4 is wanted; and why the models had to be whole in memory."""
    try:
        return *_one_by_one(wanted, LayerByLayer(), asked, weights, probes, pad, progress), ""
    except NotInLayers as reason:
        progress.begin_again()
        return *_one_by_one(wanted, Whole(), asked, weights, probes, pad, progress), str(reason)


def _one_by_one(
    wanted: list[Variant],
    loading: Loading,
    asked: Asked,
    weights: Weights,
    probes: Probes,
    pad: int,
    progress: _Progress,
) -> tuple[tuple[VariantReport, ...], Mapping[str, Cost]]:
    found: list[VariantReport] = []
    alone: list[Mapping[str, Closeness]] = []
    with tempfile.TemporaryDirectory(prefix="loraplex-fidelity-") as scratch:
        to_adapter, to_base = (_references(Path(scratch) / of, probes) for of in ("adapter", "base"))
        for variant in wanted:
            is_cost = variant.part == "base" and asked.stored == "nf4"
            references = [to_adapter, to_base] if is_cost else [to_adapter]
            own, *others = _one(variant, loading, asked, weights, probes, references, pad, progress)
            found.append(VariantReport(variant.part, variant.base, variant.stored, variant.computed, **own))
            alone += others
    return tuple(found), _costs(*alone) if len(alone) == len(BASES) else {}


def _references(directory: Path, probes: Probes) -> Mapping[str, Reference]:
    directory.mkdir()
    sizes = {"task": probes.task_tokens, "general": probes.general_tokens}
    return {texts: Reference(directory / texts, tokens) for texts, tokens in sizes.items()}


def _one(
    variant: Variant,
    loading: Loading,
    asked: Asked,
    weights: Weights,
    probes: Probes,
    references: Sequence[Mapping[str, Reference]],
    pad: int,
    progress: _Progress,
) -> list[Mapping[str, Closeness]]:
    """How near it is to each of the references. The model goes with the call."""
    progress.begin(variant.name, probes.tokens)
    if asked.written is not None and variant.name == asked.judged:
        model = variant.load_written(loading, asked.written, asked.written_as, weights)
    else:
        model = variant.load(loading, weights, asked.adapter)
    chunks = log_probabilities(model, {"task": probes.task, "general": probes.general}, pad, progress.heard)
    found = {
        texts: judged(((rows, tokens) for _, rows, tokens in own), [each[texts] for each in references])
        for texts, own in groupby(chunks, key=itemgetter(0))
    }
    return [{texts: each[number] for texts, each in found.items()} for number in range(len(references))]


def _costs(original: Mapping[str, Closeness], packed: Mapping[str, Closeness]) -> Mapping[str, Cost]:
    return {texts: Cost(found.kl, found.loss - original[texts].loss) for texts, found in packed.items()}


def _modules(asked: Asked, weights: Weights, progress: _Progress) -> tuple[ModuleReport, ...]:
    found: list[ModuleReport] = []
    for base in weights.bases:
        progress.begin(f"what each format keeps, {base}", len(weights.changed))
        targets = TARGETS if base == asked.onto else ("nf4",)
        both = weights.base(base), weights.merged(base)
        found += changes(base, *both, weights.changed, weights.linear, targets, progress.heard)
    return tuple(found)
