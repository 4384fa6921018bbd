"""FLOW compose: several adapters of one base → one plain LoRA with its lineage, in a directory that appears whole.

read → combine module by module → limit the rank → write → the gate
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from adapters.base import BaseModel
from adapters.convert.change import Change, Factors
from adapters.convert.lora import trained
from adapters.convert.plain import write_plain
from adapters.convert.source import Source
from adapters.errors import Conflict, NotMergeable
from adapters.json_document import read_document
from adapters.manifest import Manifest
from adapters.merge.bases import choose_base, weights_of
from adapters.merge.combine import Combined, Part, Recipe, bad_recipe, combine
from adapters.merge.files import digest_of_adapter, prefix_of, require_same_base
from adapters.merge.operations import ADDING, require_nothing_else
from adapters.merge.vera import drawn_again
from adapters.peft_config import read_scaling
from adapters.refusals import refuse
from adapters.staging import staged
from adapters.upload import PROVENANCE
from adapters.validate import validate

Progress = Callable[[int, int], None]
"""Called with how many modules are done, and of how many."""


@dataclass(frozen=True)
class Contribution:
    """One adapter, read as far as its headers."""

    path: Path
    digest: str
    source: Source
    changes: Mapping[str, Callable[[], Change]]

    def part(self, module: str, weight: float) -> Part:
        change, scale = self.changes[module](), self._scale(module)
        if isinstance(change, Factors) and scale not in (0, 1):
            return Part(weight, Factors(change.b / scale, change.a), scale)
        return Part(weight, change)

    def _scale(self, module: str) -> float:
        """What PEFT multiplies B·A with; the others keep it in their factors."""
        return read_scaling(self.source.config, "lora_alpha").scaling_of(module) if self.source.kind == "LORA" else 1.0


@dataclass(frozen=True)
class Composition:
    """What came of it."""

    manifest: Manifest
    error: float
    """What the limit of the rank left out, relative."""
    far: float
    """How far the method went from the plain sum Σ wᵢ·ΔWᵢ, relative."""
    ranks: tuple[int, int]
    """The smallest and the largest of any module."""


def compose(
    adapters: Sequence[Path],
    base: BaseModel,
    recipe: Recipe,
    destination: Path,
    progress: Progress = lambda done, of: None,
) -> Composition:
    """`destination` becomes the adapter, validated by the server's own gate. Raises InvalidAdapter and MergeError."""
    if destination.exists():
        raise Conflict(f"{destination} is there already; name another directory", code="not_empty")
    if len(adapters) != len(recipe.weights):
        raise bad_recipe(f"{len(adapters)} adapters and {len(recipe.weights)} weights; give one for each")
    contributions = [_read(path, base) for path in adapters]
    modules = sorted({module for each in contributions for module in each.changes})
    found: dict[str, Combined] = {}
    for number, module in enumerate(modules, start=1):
        found[module] = combine(module, list(_parts(module, contributions, recipe)), recipe)
        progress(number, len(modules))
    with staged(destination.absolute()) as staging:
        write_plain(
            staging, contributions[0].source.config, {name: each.fitted.factors for name, each in found.items()}
        )
        measured = _measured(found.values())
        _write_provenance(staging, base, contributions, recipe, measured)
        manifest = validate(staging, base, max(each.fitted.factors.a.shape[0] for each in found.values()))
    return Composition(manifest, **measured)


def _read(path: Path, base: BaseModel) -> Contribution:
    prefix = prefix_of(path)
    require_same_base(path, base)
    beneath = weights_of(base, choose_base(path, base).values)
    source = Source.read(path, base, prefix, beneath)
    return Contribution(path, digest_of_adapter(path), source, _changes(path, source))


def _changes(path: Path, source: Source) -> Mapping[str, Callable[[], Change]]:
    if source.kind == "LORA":
        found = trained(source)
        if found.biases or found.whole:
            raise NotMergeable(f"{path.name} trains biases or whole tensors, which have no place in a plain LoRA")
        return found.changes
    if source.kind not in ADDING:
        raise refuse("not_lora", f"{path.name} is of the kind {source.kind[:80]!r}, which adds nothing to the weights")
    require_nothing_else(source)
    plan = ADDING[source.kind](source)
    return plan.changes if plan.merge_only is None else drawn_again(source)


def _parts(module: str, contributions: Sequence[Contribution], recipe: Recipe) -> Iterator[Part]:
    for each, weight in zip(contributions, recipe.weights, strict=True):
        if module in each.changes:
            yield each.part(module, weight)


def _measured(found: Collection[Combined]) -> dict[str, Any]:
    def root(values: Iterator[float]) -> float:
        return math.sqrt(sum(value**2 for value in values))

    size, plain = root(each.fitted.size for each in found), root(each.sum_size for each in found)
    ranks = [each.fitted.factors.a.shape[0] for each in found]
    return {
        "error": root(each.fitted.off for each in found) / size if size else 0.0,
        "far": root(each.far for each in found) / plain if plain else 0.0,
        "ranks": (min(ranks), max(ranks)),
    }


def _write_provenance(
    staging: Path,
    base: BaseModel,
    contributions: Sequence[Contribution],
    recipe: Recipe,
    measured: Mapping[str, Any],
) -> None:
    """What all parents say alike stays said."""
    recorded = [_recorded(each.path) for each in contributions]
    agreed = {
        key: recorded[0][key]
        for key in ("quantization", "chat_template_sha256")
        if all(key in each and each[key] == recorded[0].get(key) for each in recorded)
    }
    lineage = {
        "parents": [each.digest for each in contributions],
        "composition": {key: value for key, value in asdict(recipe).items() if value is not None},
        "composition_error": round(measured["error"], 8),
        "distance_from_sum": round(measured["far"], 8),
        "versions": {library: metadata.version(library) for library in ("torch", "peft")},
    }
    record = {"base_fingerprint": base.fingerprint, **agreed, "lineage": lineage}
    (staging / PROVENANCE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _recorded(adapter: Path) -> dict[str, Any]:
    return read_document(adapter / PROVENANCE) if (adapter / PROVENANCE).is_file() else {}
