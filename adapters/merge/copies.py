"""Weights of the base that lie in an adapter's file too: PEFT saves them beside an adapter on an end, and loads them.

A merge leaves them out, for it begins with the base's own; so they have to be that, or it would be another model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from adapters.base import WEIGHT
from adapters.convert.lora import is_changed
from adapters.convert.source import Source
from adapters.merge.embeddings import OF_BASE, Ends
from adapters.refusals import refuse
from adapters.safetensors_header import TensorSpan

Copies = Mapping[str, str]
"""Name in the adapter's file → name in the base."""


def without_copies(source: Source) -> tuple[Source, Copies]:
    """What is called a copy and is of nothing in the base stays, for others to refuse."""
    copies = {name: own for name in source.spans if (own := _in_base(name, source)) is not None}
    rest: dict[str, TensorSpan] = {name: span for name, span in source.spans.items() if name not in copies}
    return replace(source, spans=rest), copies


def require_unchanged(source: Source, copies: Copies) -> None:
    """Reads the values of both. Raises InvalidAdapter."""
    for name, own in copies.items():
        if is_changed(source, own, source.spans[name]):
            raise refuse("not_mergeable", f"{name[:200]!r} is not what {source.base.name} has there")


def _in_base(name: str, source: Source) -> str | None:
    if not name.endswith(OF_BASE):
        return None
    own, ends = name.removesuffix(OF_BASE) + WEIGHT, Ends.of(source.base_weights)
    if own == ends.head and own not in source.base_weights.spans:
        own = ends.embedding  # where the two are one
    return own if own in source.base_weights.spans else None
