"""loraplex.json: what our own training (or another maker) recorded beside the weights. Optional, checked, bounded."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapters.json_document import read_document
from adapters.refusals import refuse


@dataclass(frozen=True)
class Provenance:
    base_fingerprint: str | None = None
    lineage: Mapping[str, Any] = field(default_factory=dict)
    scores: Mapping[str, float] = field(default_factory=dict)
    chat_template_sha256: str | None = None


def read_provenance(path: Path) -> Provenance:
    if not path.exists():
        return Provenance()
    raw = read_document(path)
    lineage = dict(_object(raw, "lineage"))
    lineage.update({key: raw[key] for key in ("quantization", "chat_template_sha256") if raw.get(key) is not None})
    return Provenance(
        base_fingerprint=_text(raw, "base_fingerprint"),
        lineage=lineage,
        scores={name: _score(name, value) for name, value in _object(raw, "scores").items()},
        chat_template_sha256=_text(raw, "chat_template_sha256"),
    )


def _object(raw: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = raw.get(key) or {}
    if not isinstance(value, dict):
        raise refuse("bad_provenance", f"loraplex.json: {key} is a {type(value).__name__}, expected an object")
    return value


def _text(raw: Mapping[str, Any], key: str) -> str | None:
    value = raw.get(key)
    if value is not None and not isinstance(value, str):
        raise refuse("bad_provenance", f"loraplex.json: {key} is a {type(value).__name__}, expected a string")
    return value


def _score(name: str, value: Any) -> float:
    if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:
        raise refuse("bad_provenance", f"loraplex.json: score {name[:80]!r} is {value!r:.80}, expected a number")
    return float(value)
