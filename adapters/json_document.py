"""Strangers' JSON files, read with bounds: size, depth, and nothing that cannot be written as JSON again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from adapters.refusals import refuse

MAX_BYTES = 1 << 20


def read_document(path: Path, *, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """The JSON object in the file. Raises InvalidAdapter with code `bad_json`."""
    size = path.stat().st_size
    if size > max_bytes:
        raise refuse("bad_json", f"{path.name} has {size} bytes, at most {max_bytes} are read")
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_constant)
        json.dumps(content, ensure_ascii=False, allow_nan=False).encode()  # lone surrogates and 1e999 end here
    except (ValueError, RecursionError) as error:
        raise refuse("bad_json", f"{path.name} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise refuse("bad_json", f"{path.name} is a JSON {type(content).__name__}, expected an object")
    return content


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
