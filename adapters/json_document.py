"""Strangers' JSON files, read with bounds: size, depth, no name twice, nothing that cannot be written as JSON again.

It does not know what the fields mean.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from adapters.json_bounds import require_bounded
from adapters.refusals import refuse

MAX_BYTES = 1 << 20
MAX_VALUES = 1 << 18


def read_document(path: Path, *, max_bytes: int = MAX_BYTES, max_values: int = MAX_VALUES) -> dict[str, Any]:
    """The JSON object in the file. Raises InvalidAdapter with code `bad_json`."""
    size = path.stat().st_size
    if size > max_bytes:
        raise refuse("bad_json", f"{path.name} has {size} bytes, at most {max_bytes} are read")
    try:
        raw = path.read_bytes()
        require_bounded(raw, max_values)
        content = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
        json.dumps(content, ensure_ascii=False, allow_nan=False).encode()  # lone surrogates and 1e999 end here
    except (ValueError, RecursionError) as error:
        raise refuse("bad_json", f"{path.name} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise refuse("bad_json", f"{path.name} is a JSON {type(content).__name__}, expected an object")
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Parsers differ in which of two they take, so the adapter that was checked might not be the one that is served."""
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a name occurs twice in one object")
    return content


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
