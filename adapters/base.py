"""The base model as the artifact side sees it: a Hugging Face safetensors directory, its identity and its modules.

Reads JSON and safetensors headers only (and the bytes once, for the fingerprint). Knows plain and bitsandbytes
pre-quantised checkpoints, whole or sharded. It loads no weights and does not know which engine serves them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapters.errors import AdapterError
from adapters.fingerprint import Tensors, cached_fingerprint, fingerprint
from adapters.safetensors_header import BadHeader, TensorSpan, read_bytes, read_header

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PACKED_STATE = ".quant_state.bitsandbytes__"
WEIGHT = ".weight"
NOT_LINEAR = ("embed", "norm", "lm_head", "wte", "wpe", "score", "classifier")
"""Two-dimensional weights that take no LoRA here, by their last name part (README, facts about the engine)."""


@dataclass(frozen=True)
class BaseModel:
    """What an adapter has to fit."""

    path: Path
    name: str
    """The served name, or the directory's."""
    fingerprint: str
    """`sha256:<64 hex>` over tensor names, dtypes, shapes, bytes and the architecture in config.json."""
    modules: Mapping[str, tuple[int, int]] = field(repr=False)
    """Module that can carry a LoRA → (out_features, in_features)."""

    @classmethod
    def read(cls, path: Path, *, name: str | None = None, cache_dir: Path | None = None) -> BaseModel:
        """Raises AdapterError with code `bad_base` when the directory is not a safetensors checkpoint."""
        path = Path(path)
        try:
            config = _read_object(path / CONFIG)
            shards = shards_of(path)
            tensors = _tensors(shards)
            modules = _modules(tensors)
            identity = _identity(tensors, config, [path / CONFIG, *shards], cache_dir)
        except (OSError, ValueError) as error:
            raise _bad_base(path, str(error)) from error
        if not modules:
            raise _bad_base(path, "no linear module found in its safetensors headers")
        return cls(path=path, name=name or path.resolve().name, fingerprint=identity, modules=modules)


def _bad_base(path: Path, reason: str) -> AdapterError:
    return AdapterError(
        f"{path} cannot be the base model: {reason}. Expected a Hugging Face directory with {CONFIG} and "
        f"{SINGLE} (or {INDEX} and its shards)",
        code="bad_base",
    )


def _read_object(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} is not a JSON object")
    return content


def shards_of(path: Path) -> list[Path]:
    """The safetensors files of a model directory. Raises ValueError for an index that makes no sense, or OSError."""
    if not (path / INDEX).is_file():
        return [path / SINGLE]
    weight_map = _read_object(path / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{INDEX} has no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    if any(Path(name).name != name for name in names):
        raise ValueError(f"{INDEX} names a shard outside the directory")
    return [path / name for name in names]


def _tensors(shards: list[Path]) -> Tensors:
    tensors: dict[str, tuple[Path, TensorSpan]] = {}
    for shard in shards:
        try:
            spans = read_header(shard)
        except BadHeader as error:
            raise ValueError(f"{shard.name}: {error}") from error
        for name, span in spans.items():
            if name in tensors:
                raise ValueError(f"tensor {name} lies in {tensors[name][0].name} and in {shard.name}")
            tensors[name] = (shard, span)
    return tensors


def _modules(tensors: Tensors) -> dict[str, tuple[int, int]]:
    weights = (name for name in tensors if name.endswith(WEIGHT))
    shapes = {name.removesuffix(WEIGHT): _unpacked_shape(name, tensors) for name in weights}
    return {
        module: (shape[0], shape[1])
        for module, shape in sorted(shapes.items())
        if len(shape) == 2 and not any(part in module.rpartition(".")[2] for part in NOT_LINEAR)
    }


def _unpacked_shape(weight: str, tensors: Tensors) -> tuple[int, ...]:
    """bitsandbytes packs a 4-bit weight into a column of bytes and keeps its real shape in a JSON tensor."""
    for kind in ("nf4", "fp4"):
        state = tensors.get(f"{weight}{PACKED_STATE}{kind}")
        if state is not None:
            return tuple(int(size) for size in json.loads(read_bytes(*state))["shape"])
    return tensors[weight][1].shape


def _identity(tensors: Tensors, config: Mapping[str, Any], files: list[Path], cache_dir: Path | None) -> str:
    if cache_dir is None:
        return fingerprint(tensors, config)
    return cached_fingerprint(tensors, config, files, cache_dir)
