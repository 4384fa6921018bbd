"""A staging directory → its Manifest, or the reason why this base cannot serve it (adapters/refusals.py lists them).

Everything the engine would accept and compute wrongly ends here (README, facts about the engine). Reads headers and
streams the values once; it needs no torch and does not know where the files go.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from adapters.base import BaseModel
from adapters.convert import AS_IT_CAME, Verdict
from adapters.json_document import read_document
from adapters.lora_weights import EXPONENT, Pair, largest_magnitude, read_pairs, read_spans
from adapters.manifest import Manifest
from adapters.peft_config import LoraConfig, read_base_model, read_config
from adapters.provenance import Provenance, read_provenance
from adapters.refusals import refuse
from adapters.safetensors_header import TensorSpan
from adapters.store import digest_files
from adapters.tokenizer_files import chat_template_sha256, check_tokenizer
from adapters.upload import CONFIG, PROVENANCE, WEIGHTS

CARRIES = re.compile(r"(?:base_model\.model\.)?(?P<module>.+?)\.(?:lora_|token_adapter\.).+")
"""Also embedding and head, which a merge takes and no engine swaps."""
LARGEST_BF16 = 3.3895313892515355e38


def validate(staged: Path, base: BaseModel, max_rank: int, verdict: Verdict = AS_IT_CAME) -> Manifest:
    """Raises InvalidAdapter; its `code` is a key of REFUSALS. `verdict`: what `convert` said before."""
    _require_files(staged)
    provenance = read_provenance(staged / PROVENANCE)
    _require_same_base(provenance, base)
    if verdict.merge_only is not None:
        return _mergeable(staged, base, provenance, verdict)
    config = read_config(staged / CONFIG, max_rank)
    pairs = read_pairs(staged / WEIGHTS, base)
    for module, pair in pairs.items():
        _require_fit(module, pair, config.rank_of(module), base)
    warnings = [
        *config.warnings,
        *_base_warnings(config.base_model, provenance, base),
        *_target_warnings(config, pairs),
    ]
    warnings += _require_finite(staged / WEIGHTS, pairs, config)
    warnings += check_tokenizer(staged, base.path)
    return replace(_manifest(staged, config, provenance, pairs, tuple(warnings)), conversion=verdict.conversion)


def _mergeable(staged: Path, base: BaseModel, provenance: Provenance, verdict: Verdict) -> Manifest:
    """Of a kind that no LoRA stands for: `convert` compared its names and shapes with the base."""
    raw, spans = read_document(staged / CONFIG), read_spans(staged / WEIGHTS, base)
    for name, span in spans.items():
        if span.dtype not in EXPONENT:
            raise refuse("unsupported_dtype", f"{name[:200]} is {span.dtype}")
        if not largest_magnitude(staged / WEIGHTS, span) <= LARGEST_BF16:
            raise refuse("non_finite", f"{name[:200]} has values that are not finite")
    modules = {match["module"] for name in spans if (match := CARRIES.fullmatch(name)) is not None}
    modules |= {module for module in base.modules if any(f"{module}." in name for name in spans)}
    named = read_base_model(raw)
    rank, alpha = raw.get("r"), raw.get("lora_alpha", raw.get("alpha"))
    return Manifest(
        **_facts(staged, list(spans.values()), modules),
        kind=verdict.kind,
        rank=rank if type(rank) is int and 0 <= rank < 1 << 20 else 0,
        alpha=float(alpha) if isinstance(alpha, int | float) and abs(alpha) < 1e9 else 0.0,
        base_model=named,
        base_fingerprint=provenance.base_fingerprint,
        warnings=(*_base_warnings(named, provenance, base), *check_tokenizer(staged, base.path)),
        lineage=provenance.lineage,
        scores=provenance.scores,
        conversion=verdict.conversion,
        merge_only=verdict.merge_only,
    )


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


def _base_warnings(named: str, provenance: Provenance, base: BaseModel) -> Iterator[str]:
    if provenance.base_fingerprint is None:
        says = f"it names {named[:120]!r}" if named else "it names none"
        yield f"no base fingerprint is recorded, so only names and shapes show that it fits {base.name}; {says}"
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
    return Manifest(
        **_facts(staged, [span for pair in pairs.values() for span in (pair.a, pair.b)], pairs),
        kind="lora",
        rank=max(config.rank_of(module) for module in pairs),
        alpha=config.alpha,
        base_model=config.base_model,
        base_fingerprint=provenance.base_fingerprint,
        warnings=warnings,
        lineage=provenance.lineage,
        scores=provenance.scores,
    )


def _facts(staged: Path, spans: Sequence[TensorSpan], modules: Collection[str]) -> dict[str, Any]:
    """What every manifest has, whatever the kind."""
    digest, files = digest_files(staged)
    dtypes = {span.dtype for span in spans}
    return {
        "digest": digest,
        "size_bytes": sum((staged / name).stat().st_size for name in files),
        "target_modules": tuple(sorted({module.rpartition(".")[2] for module in modules})),
        "module_count": len(modules),
        "parameter_count": sum(math.prod(span.shape) for span in spans),
        "dtype": dtypes.pop() if len(dtypes) == 1 else "mixed",
        "files": files,
    }
