"""The identity of base weights: one digest over what is computed with, whatever the files are called.

The same tensors in other shards give the same fingerprint; another dtype, value or architecture gives another one.
It does not know what an adapter is.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from adapters.safetensors_header import TensorSpan

CHUNK_BYTES = 1 << 22
NOT_ARCHITECTURE = frozenset(
    ("transformers_version", "torch_dtype", "dtype", "use_cache", "quantization_config", "name_or_path")
)
"""Fields of config.json that say how it was saved, not what it computes (beside those that start with `_`)."""

Tensors = Mapping[str, tuple[Path, TensorSpan]]


def fingerprint(tensors: Tensors, config: Mapping[str, Any]) -> str:
    total = hashlib.sha256(json.dumps(_architecture(config), sort_keys=True).encode())
    for name, (path, span) in sorted(tensors.items()):
        line = [name, span.dtype, list(span.shape), _sha256_of(path, span)]
        total.update(b"\n" + json.dumps(line).encode())
    return f"sha256:{total.hexdigest()}"


def cached_fingerprint(tensors: Tensors, config: Mapping[str, Any], files: Iterable[Path], cache_dir: Path) -> str:
    """As `fingerprint`, but read once for files whose path, size and mtime stay: 15 GB take half a minute."""
    key = [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in sorted(files)]
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    entry = cache_dir / f"base-{name}.json"
    known = _read_entry(entry, key)
    if known is None:
        known = fingerprint(tensors, config)
        _write_entry(entry, {"files": key, "fingerprint": known})
    return known


def _architecture(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in NOT_ARCHITECTURE and not key.startswith("_")}


def _sha256_of(path: Path, span: TensorSpan) -> str:
    digest, left = hashlib.sha256(), span.size_bytes
    with path.open("rb") as file:
        file.seek(span.offset)
        while left:
            chunk = file.read(min(CHUNK_BYTES, left))
            if not chunk:
                raise OSError(f"{path} became shorter while it was read")
            digest.update(chunk)
            left -= len(chunk)
    return digest.hexdigest()


def _read_entry(entry: Path, key: list[list[Any]]) -> str | None:
    try:
        stored = json.loads(entry.read_text())
        return str(stored["fingerprint"]) if stored["files"] == key else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write_entry(entry: Path, content: Mapping[str, Any]) -> None:
    entry.parent.mkdir(parents=True, exist_ok=True)
    temporary = entry.with_name(f".{uuid.uuid4().hex}")
    temporary.write_text(json.dumps(content))
    os.replace(temporary, entry)
