"""Token embeddings that were trained one by one (`trainable_token_indices`): rows that stand in place of the base's.

Where embedding and head are one matrix PEFT trains one row for both, so they stay one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from adapters.base import WEIGHT
from adapters.convert.source import Source
from adapters.refusals import refuse
from adapters.safetensors_header import TensorSpan

OPTION = "trainable_token_indices"
NAME = re.compile(r"(?P<module>.+)\.token_adapter\.trainable_tokens_delta")


@dataclass(frozen=True)
class Rows:
    span: TensorSpan
    """[tokens, width]: what the rows become."""
    indices: tuple[int, ...]


def split_tokens(source: Source) -> tuple[Source, Mapping[str, Rows]]:
    """The rest of the adapter, and rows by the base's tensor. Raises InvalidAdapter."""
    found = {match["module"]: name for name in source.spans if (match := NAME.fullmatch(name)) is not None}
    if not found:
        return source, {}
    rows = {f"{module}{WEIGHT}": _rows(source, module, source.spans[name]) for module, name in found.items()}
    config = {key: value for key, value in source.config.items() if key != OPTION}
    spans = {name: span for name, span in source.spans.items() if name not in found.values()}
    return replace(source, config=config, spans=spans), rows


def _rows(source: Source, module: str, span: TensorSpan) -> Rows:
    own = source.base_weights.spans.get(f"{module}{WEIGHT}")
    if own is None or len(own[1].shape) != 2:
        raise refuse("unknown_module", f"{module[:200]!r} is no embedding of {source.base.name}")
    count, width = own[1].shape
    indices = _indices(source.config.get(OPTION), module)
    if len(set(indices)) < len(indices) or not all(type(each) is int and 0 <= each < count for each in indices):
        raise refuse("bad_config", f"{OPTION} of {module} is not a list of different numbers below {count}")
    if span.shape != (len(indices), width):
        raise refuse("shape_mismatch", f"{module}: trained tokens are {span.shape}, expected {(len(indices), width)}")
    return Rows(span, tuple(indices))


def _indices(given: Any, module: str) -> list[Any]:
    if isinstance(given, dict):
        given = next((value for key, value in given.items() if module == key or module.endswith(f".{key}")), None)
    if not isinstance(given, list):
        raise refuse("bad_config", f"{OPTION} says nothing of {module}")
    return given
