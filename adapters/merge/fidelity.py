"""FLOW verify: texts → the adapter path as reference → every variant against it → what each format keeps → a report.

One model is in memory at a time; what the reference says of each token lies on disk meanwhile.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from adapters.merge.closeness import Reference
from adapters.merge.formats import TARGETS
from adapters.merge.models import compute_type, log_probabilities, written_model
from adapters.merge.probes import Probes, gather
from adapters.merge.report import FidelityReport, ModuleReport, Told, VariantReport, name_of
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
        tokens = probes.task_tokens + probes.general_tokens
        progress = _Progress(told, len(wanted) * tokens + len(weights.bases) * weights.count)
        compared = _compared(wanted, asked, weights, probes, pad, progress)
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
        modules=modules,
    )


class _Progress:
    def __init__(self, told: Told, of: int) -> None:
        self._told, self._of, self._done, self._what = told, of, 0, ""

    def begin(self, what: str) -> None:
        self._what = what
        self.advance(0)

    def advance(self, count: int = 1) -> None:
        self._done += count
        self._told(self._what, self._done, self._of)


def _compared(
    wanted: list[Variant], asked: Asked, weights: Weights, probes: Probes, pad: int, progress: _Progress
) -> tuple[VariantReport, ...]:
    with tempfile.TemporaryDirectory(prefix="loraplex-fidelity-") as scratch:
        references = {
            "task": Reference(Path(scratch) / "task", probes.task_tokens),
            "general": Reference(Path(scratch) / "general", probes.general_tokens),
        }
        return tuple(_one(variant, asked, weights, probes, references, pad, progress) for variant in wanted)


def _one(
    variant: Variant,
    asked: Asked,
    weights: Weights,
    probes: Probes,
    references: Mapping[str, Reference],
    pad: int,
    progress: _Progress,
) -> VariantReport:
    progress.begin(variant.name)
    if asked.written is not None and variant.name == asked.judged:
        model = written_model(asked.written, compute_type(variant.stored))
    else:
        model = variant.load(weights, asked.adapter)
    figures = {}
    for texts, examples in (("task", probes.task), ("general", probes.general)):
        chunks = log_probabilities(model, examples, pad, progress.advance)
        figures[texts] = references[texts].judge(chunks)
    return VariantReport(
        part=variant.part,
        base=variant.base,
        stored=variant.stored,
        computed=variant.computed,
        **figures,
    )


def _modules(asked: Asked, weights: Weights, progress: _Progress) -> tuple[ModuleReport, ...]:
    found: list[ModuleReport] = []
    for base in weights.bases:
        progress.begin(f"what each format keeps, {base}")
        both = weights.base(base), weights.merged(base)
        targets = TARGETS if base == asked.onto else ("nf4",)
        found += changes(base, *both, weights.linear, targets, progress.advance)
    return tuple(found)
