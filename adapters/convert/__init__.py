"""A staged adapter of any PEFT kind → a plain LoRA in its place, with its error; or why only a merge can do it.

    read → plan (names, shapes, kind) → compute ΔW module by module → fit to the rank limit → judge → write

What is a plain LoRA already, and what must be refused, is left as it is for `validate`. The error is that of the
weights, ‖ΔW - B·A‖/‖ΔW‖ over all modules; up to 1e-5 of it counts as none.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from adapters.base import BaseModel
from adapters.convert.aside import aside
from adapters.convert.change import EXACT, Fitted, fit
from adapters.convert.kinds import adalora, loha, lokr, vera
from adapters.convert.lora import lora
from adapters.convert.multiplying import MULTIPLYING, multiplying
from adapters.convert.plain import write_plain
from adapters.convert.plan import Plan
from adapters.convert.source import Source
from adapters.json_document import read_document
from adapters.refusals import refuse
from adapters.upload import CONFIG, INITIAL, ORIGINAL, WEIGHTS

PLANNERS = {"ADALORA": adalora, "LOHA": loha, "LOKR": lokr, "VERA": vera, **dict.fromkeys(MULTIPLYING, multiplying)}


@dataclass(frozen=True)
class Verdict:
    """What became of it."""

    kind: str = "lora"
    conversion: Mapping[str, Any] = field(default_factory=dict)
    """From what, how exactly, and the digests of what was sent. Empty: nothing was done."""
    merge_only: str | None = None
    """Why it cannot be swapped per request."""


AS_IT_CAME = Verdict()


def convert(staged: Path, base: BaseModel, max_rank: int, max_error: float = 0.0) -> Verdict:
    """Raises InvalidAdapter. `max_error`: what the caller accepts where a LoRA of `max_rank` is not exact.

    Names, shapes and ranks are compared with the base before a value is read: a small file cannot fill the memory.
    """
    plan, source = _plan(staged, base, max_rank)
    if plan is None or source is None:
        return AS_IT_CAME
    if plan.merge_only is not None:
        return Verdict(plan.kind, merge_only=plan.merge_only)
    fitted = aside(lambda: _fit(plan, max_rank))
    error = _overall(fitted.values())
    conversion = _facts(staged, plan, fitted, error)
    if error > max(EXACT, max_error):
        return _not_accepted(plan, conversion, error, max_rank)
    _write(staged, source.config, fitted, keep_original=error > EXACT)
    return Verdict(conversion=conversion)


def _plan(staged: Path, base: BaseModel, max_rank: int) -> tuple[Plan | None, Source | None]:
    if not ((staged / CONFIG).is_file() and (staged / WEIGHTS).is_file()):
        return None, None
    kind = str(read_document(staged / CONFIG).get("peft_type", "LORA")).upper()
    if kind not in PLANNERS and kind != "LORA":
        return None, None
    source = Source.read(staged, base)
    if kind == "LORA":
        return lora(source, max_rank), source
    _require_nothing_else(source.config)
    return PLANNERS[kind](source), source


def _require_nothing_else(config: Mapping[str, Any]) -> None:
    """Beside a LoRA, whole modules and biases are compared with the base's; beside these kinds they are not read."""
    if config.get("modules_to_save"):
        raise refuse("modules_to_save", f"modules_to_save is {str(config['modules_to_save'])[:120]!r}")
    if config.get("bias", "none") != "none":
        raise refuse("lora_bias", f"bias is {str(config['bias'])[:120]!r}, expected 'none'")


def _fit(plan: Plan, max_rank: int) -> dict[str, Fitted]:
    """What overflows comes out as not finite, and is refused as such."""
    try:
        with np.errstate(all="ignore"):
            return {module: fit(change(), max_rank) for module, change in plan.changes.items()}
    except np.linalg.LinAlgError as error:
        raise refuse("non_finite", f"what it adds to the weights cannot be computed: {error}") from error


def _overall(fitted: Collection[Fitted]) -> float:
    off = math.sqrt(sum(each.off**2 for each in fitted))
    size = math.sqrt(sum(each.size**2 for each in fitted))
    if not math.isfinite(size):
        raise refuse("non_finite", "what it adds to the weights is not finite")
    return off / size if size else 0.0


def _facts(staged: Path, plan: Plan, fitted: Mapping[str, Fitted], error: float) -> dict[str, Any]:
    ranks = [each.factors.a.shape[0] for each in fitted.values()]
    sent = (CONFIG, WEIGHTS, INITIAL)
    return {
        "from": plan.kind,
        "exact": error <= EXACT,
        "error": 0.0 if error <= EXACT else error,
        "largest_error": 0.0 if error <= EXACT else max((each.error for each in fitted.values()), default=0.0),
        "ranks": {"smallest": min(ranks), "largest": max(ranks), "sum": sum(ranks)} if ranks else {},
        **plan.facts,
        "source_sha256": {name: _sha256(staged / name) for name in sent if (staged / name).is_file()},
    }


def _not_accepted(plan: Plan, conversion: Mapping[str, Any], error: float, max_rank: int) -> Verdict:
    found = f"as a LoRA of rank {max_rank} its change of the weights is off by {error:.2%}"
    accept = f"upload it with max_error={math.ceil(error * 1000) / 1000:g} to accept that"
    if not plan.merges:
        raise refuse("rank_too_large", f"this server takes at most rank {max_rank}; {found}: {accept}")
    return Verdict(plan.kind, conversion, merge_only=f"{found}; {accept}")


def _write(staged: Path, sent: Mapping[str, Any], fitted: Mapping[str, Fitted], keep_original: bool) -> None:
    """The plain LoRA in place of what was sent, which stays beside it where the two are not the same."""
    if keep_original:
        for name in (CONFIG, WEIGHTS):
            (staged / name).rename(staged / f"{ORIGINAL}{name}")
    (staged / INITIAL).unlink(missing_ok=True)
    write_plain(staged, sent, {module: each.factors for module, each in fitted.items()})


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
