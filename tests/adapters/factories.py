"""Tiny bases and adapters as bytes, made without torch and without the safetensors library."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from adapters.upload import UploadedFile

HIDDEN, INNER, LAYERS = 8, 16, 2
MODULES = {
    f"model.layers.{layer}.{name}": shape
    for layer in range(LAYERS)
    for name, shape in {"self_attn.q_proj": (HIDDEN, HIDDEN), "mlp.up_proj": (INNER, HIDDEN)}.items()
}
BITS = {"F32": 32, "BF16": 16, "F16": 16, "F64": 64, "U8": 8}
VOCABULARY = {"<pad>": 0, "a": 1, "b": 2, "<end>": 3}


@dataclass(frozen=True)
class Tensor:
    dtype: str
    shape: tuple[int, ...]
    data: bytes


def tensor(values: Any, dtype: str = "F32") -> Tensor:
    array = np.asarray(values, dtype="<f4")
    if dtype == "BF16":
        return Tensor(dtype, array.shape, (array.view("<u4") >> 16).astype("<u2").tobytes())
    return Tensor(
        dtype, array.shape, array.astype({"F32": "<f4", "F16": "<f2", "F64": "<f8", "U8": "u1"}[dtype]).tobytes()
    )


def safetensors(tensors: Mapping[str, Tensor]) -> bytes:
    header: dict[str, Any] = {}
    position = 0
    for name, item in tensors.items():
        end = position + len(item.data)
        header[name] = {"dtype": item.dtype, "shape": list(item.shape), "data_offsets": [position, end]}
        position = end
    return with_header(json.dumps(header).encode(), b"".join(item.data for item in tensors.values()))


def with_header(header: bytes, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def base_tensors(seed: int = 0) -> dict[str, Tensor]:
    random = np.random.default_rng(seed)
    shapes = {f"{name}.weight": shape for name, shape in MODULES.items()} | {
        "model.embed_tokens.weight": (len(VOCABULARY), HIDDEN),
        "lm_head.weight": (len(VOCABULARY), HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    return {name: tensor(random.normal(size=shape), "BF16") for name, shape in shapes.items()}


def write_base(path: Path, tensors: Mapping[str, Tensor] | None = None, **config: Any) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"model_type": "tiny", "vocab_size": len(VOCABULARY), **config}))
    (path / "model.safetensors").write_bytes(safetensors(tensors or base_tensors()))
    (path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": VOCABULARY}, "added_tokens": []}))
    (path / "chat_template.jinja").write_text("{{ messages }}")
    return path


def lora_tensors(rank: int = 4, seed: int = 0, dtype: str = "F32", modules: Any = MODULES) -> dict[str, Tensor]:
    random = np.random.default_rng(seed)
    tensors = {}
    for name in modules:
        out_features, in_features = MODULES[name]
        tensors[f"base_model.model.{name}.lora_A.weight"] = tensor(random.normal(size=(rank, in_features)), dtype)
        tensors[f"base_model.model.{name}.lora_B.weight"] = tensor(random.normal(size=(out_features, rank)), dtype)
    return tensors


def lora_config(**changes: Any) -> dict[str, Any]:
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": "tiny",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "up_proj"],
        "bias": "none",
        "init_lora_weights": True,
    }
    return {**config, **changes}


@dataclass
class AdapterFiles:
    """A good adapter unless a test spoils one of its parts."""

    config: dict[str, Any] = field(default_factory=lora_config)
    tensors: dict[str, Tensor] = field(default_factory=lora_tensors)
    extra: dict[str, bytes] = field(default_factory=dict)

    def files(self) -> dict[str, bytes]:
        return {
            "adapter_config.json": json.dumps(self.config).encode(),
            "adapter_model.safetensors": safetensors(self.tensors),
            **self.extra,
        }

    def write(self, path: Path) -> Path:
        path.mkdir(parents=True, exist_ok=True)
        for name, content in self.files().items():
            (path / name).write_bytes(content)
        return path

    def uploads(self) -> list[UploadedFile]:
        return loose(self.files())


def loose(files: Mapping[str, bytes]) -> list[UploadedFile]:
    return [UploadedFile(name, io.BytesIO(content)) for name, content in files.items()]


def tar(files: Mapping[str, bytes], mode: str = "w:gz") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return out.getvalue()


def uploaded(name: str, content: bytes) -> list[UploadedFile]:
    return [UploadedFile(name, io.BytesIO(content))]
