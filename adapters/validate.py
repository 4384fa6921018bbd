"""A staging directory → its Manifest, or the reason why this base cannot serve it (adapters/refusals.py lists them).

Everything the engine would accept and compute wrongly ends here (README, facts about the engine). Reads headers and
streams the values once; it needs no torch and does not know where the files go.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from adapters.base import BaseModel
from adapters.lora_weights import Pair, largest_magnitude, read_pairs
from adapters.manifest import Manifest
from adapters.peft_config import LoraConfig, read_config
from adapters.provenance import Provenance, read_provenance
from adapters.refusals import refuse
from adapters.store import digest_files
from adapters.tokenizer_files import chat_template_sha256, check_tokenizer
from adapters.upload import CONFIG, PROVENANCE, WEIGHTS

LARGEST_BF16 = 3.3895313892515355e38


def validate(staged: Path, base: BaseModel, max_rank: int, conversion: Mapping[str, Any] | None = None) -> Manifest:
    """Raises InvalidAdapter; its `code` is a key of REFUSALS. `conversion`: what `convert` did before."""
    _require_files(staged)
    config = read_config(staged / CONFIG, max_rank)
    provenance = read_provenance(staged / PROVENANCE)
    _require_same_base(provenance, base)
    pairs = read_pairs(staged / WEIGHTS, base)
    for module, pair in pairs.items():
        _require_fit(module, pair, config.rank_of(module), base)
    warnings = [*config.warnings, *_base_warnings(config, provenance, base), *_target_warnings(config, pairs)]
    warnings += _require_finite(staged / WEIGHTS, pairs, config)
    warnings += check_tokenizer(staged, base.path)
    return replace(_manifest(staged, config, provenance, pairs, tuple(warnings)), conversion=conversion or {})


def _require_files(staged: Path) -> None:
    missing = [name for name in (CONFIG, WEIGHTS) if not (staged / name).is_file()]
    if missing:
        raise refuse("missing_file", f"the upload has no {' and no '.join(missing)}")


def _require_same_base(provenance: Provenance, base: BaseModel) -> None:
    trained_on = provenance.base_fingerprint
    if trained_on is not None and trained_on != base.fingerprint:
        raise refuse("wrong_base", f"trained on the base {trained_on[:80]}, served is {base.name} {base.fingerprint}")


def _require_fit(module: str, pair: Pair, rank: int, base: BaseModel) -> None:
    out_features, in_features = base.modules[module]
    if len(pair.a.shape) != 2 or len(pair.b.shape) != 2:
        raise refuse("shape_mismatch", f"{module}: A is {pair.a.shape}, B is {pair.b.shape}, expected two matrices")
    (rank_a, width), (height, rank_b) = pair.a.shape, pair.b.shape
    if (height, width) != (out_features, in_features):
        raise refuse(
            "shape_mismatch",
            f"{module}: B·A is {height}×{width}, in the base {base.name} it is {out_features}×{in_features}",
        )
    if not rank_a == rank_b == rank:
        raise refuse("rank_mismatch", f"{module}: A has rank {rank_a}, B has {rank_b}, the configuration says {rank}")


def _require_finite(weights: Path, pairs: Mapping[str, Pair], config: LoraConfig) -> Iterator[str]:
    """The engine folds the scaling into B and casts to the base's dtype; that must be finite as well."""
    largest_b = 0.0
    for module, pair in pairs.items():
        a, b = largest_magnitude(weights, pair.a), largest_magnitude(weights, pair.b)
        if not max(a, b, b * abs(config.scaling_of(module))) <= LARGEST_BF16:
            raise refuse("non_finite", f"{module} has values that are not finite, alone or times the LoRA scaling")
        largest_b = max(largest_b, b)
    if largest_b == 0:
        yield "every lora_B is zero: the adapter changes nothing"


def _base_warnings(config: LoraConfig, provenance: Provenance, base: BaseModel) -> Iterator[str]:
    if provenance.base_fingerprint is None:
        named = f"it names {config.base_model[:120]!r}" if config.base_model else "it names none"
        yield f"no base fingerprint is recorded, so only names and shapes show that it fits {base.name}; {named}"
    template = provenance.chat_template_sha256
    if template is not None and template != chat_template_sha256(base.path):
        yield "it was trained with another chat template than the base's, which is what is served"


def _target_warnings(config: LoraConfig, pairs: Mapping[str, Pair]) -> Iterator[str]:
    stray = [module for module in pairs if not config.targets(module)]
    if stray:
        yield f"{len(stray)} modules carry weights but are not in target_modules, such as {stray[0]}; they are served"


def _manifest(
    staged: Path, config: LoraConfig, provenance: Provenance, pairs: Mapping[str, Pair], warnings: tuple[str, ...]
) -> Manifest:
    digest, files = digest_files(staged)
    spans = [span for pair in pairs.values() for span in (pair.a, pair.b)]
    dtypes = {span.dtype for span in spans}
    return Manifest(
        digest=digest,
        size_bytes=sum((staged / name).stat().st_size for name in files),
        kind="lora",
        rank=max(config.rank_of(module) for module in pairs),
        alpha=config.alpha,
        target_modules=tuple(sorted({module.rpartition(".")[2] for module in pairs})),
        module_count=len(pairs),
        parameter_count=sum(span.shape[0] * span.shape[1] for span in spans),
        dtype=dtypes.pop() if len(dtypes) == 1 else "mixed",
        base_model=config.base_model,
        base_fingerprint=provenance.base_fingerprint,
        files=files,
        warnings=warnings,
        lineage=provenance.lineage,
        scores=provenance.scores,
    )
