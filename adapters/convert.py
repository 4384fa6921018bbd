"""A staged adapter of a kind that the engine does not serve → a plain LoRA that computes the same, in its place.

So far AdaLoRA (Zhang et al. 2023), exactly. PEFT computes for every module

    ΔW = s · B · diag(λ) · A        s = lora_alpha / (init_r + 1e-5), also after ranks were taken away

so with g = √(s·|λ|) the LoRA of A' = g·A and B' = B·(sign λ · g), of scaling 1, has the same ΔW. Modules keep different
ranks; they are padded with zeros to the largest. The engine's slots are padded anyway.

Everything else is left as it is for `validate` to judge.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from adapters.base import BaseModel
from adapters.json_document import read_document
from adapters.lora_weights import read_spans
from adapters.refusals import refuse
from adapters.safetensors_header import TensorSpan
from adapters.upload import CONFIG, WEIGHTS

Matrix = npt.NDArray[np.float32]

NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<part>[ABE])")
EPSILON = 1e-5
"""PEFT adds it to the rank that it divides by (tuners/adalora/layer.py)."""
ONLY_ADALORA = (
    *("target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"),
    *("rank_pattern", "alpha_pattern", "use_rslora"),
)
LARGEST_RANK = 4096


def convert(staged: Path, base: BaseModel, max_rank: int) -> Mapping[str, Any] | None:
    """What was done, for the manifest; None when nothing had to be. Raises InvalidAdapter.

    Padding multiplies what was sent: so modules, shapes and ranks are those of the base and within the limit before a
    value is read.
    """
    config_path, weights_path = staged / CONFIG, staged / WEIGHTS
    if not (config_path.is_file() and weights_path.is_file()):
        return None
    config = read_document(config_path)
    if str(config.get("peft_type")).upper() != "ADALORA":
        return None
    source = {path.name: _sha256(path) for path in (config_path, weights_path)}
    scale = _scale(config)
    modules = _modules(weights_path, base)
    ranks = {module: parts["E"].shape[0] for module, parts in modules.items() if parts["E"].shape[0]}
    if not ranks:
        raise refuse("no_modules", "AdaLoRA took every rank of every module away")
    largest = max(ranks.values())
    if largest > max_rank:
        raise refuse("rank_too_large", f"rank {largest}, this server takes at most {max_rank}")
    tensors: dict[str, Matrix] = {}
    for module in ranks:
        a, b = _plain({part: _values(weights_path, span) for part, span in modules[module].items()}, scale, largest)
        tensors |= {f"base_model.model.{module}.lora_A.weight": a, f"base_model.model.{module}.lora_B.weight": b}
    save_file(tensors, weights_path, metadata={"format": "pt"})
    plain = {key: value for key, value in config.items() if key not in ONLY_ADALORA}
    plain |= {"peft_type": "LORA", "r": largest, "lora_alpha": largest, "init_lora_weights": True}
    plain["target_modules"] = sorted({module.rpartition(".")[2] for module in ranks})
    config_path.write_text(json.dumps(plain, indent=2))
    return {
        "from": "adalora",
        "exact": True,
        "ranks": {"smallest": min(ranks.values()), "largest": largest, "sum": sum(ranks.values())},
        "modules_without_rank": len(modules) - len(ranks),
        "source_sha256": source,
    }


def _scale(config: Mapping[str, Any]) -> float:
    alpha, rank = config.get("lora_alpha"), config.get("init_r")
    if type(rank) is not int or not 1 <= rank <= LARGEST_RANK:
        raise refuse("bad_config", f"init_r is {str(rank)[:120]!r}, expected a whole number of at least 1")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not 0 < alpha <= 1e9:
        raise refuse("bad_scaling", f"lora_alpha is {str(alpha)[:120]!r}, expected more than 0 and at most 1e9")
    return float(alpha) / (rank + EPSILON)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _modules(path: Path, base: BaseModel) -> dict[str, dict[str, TensorSpan]]:
    """Module → its A [rank, in], B [out, rank] and E [rank, 1]."""
    found: dict[str, dict[str, TensorSpan]] = {}
    for name, span in read_spans(path, base).items():
        match = NAME.fullmatch(name)
        if match is None:
            raise refuse("unsupported_tensor", f"tensor {name[:200]!r} is not part of an AdaLoRA")
        found.setdefault(match["module"], {})[match["part"]] = span
    for module, parts in found.items():
        if missing := [part for part in "ABE" if part not in parts]:
            raise refuse("unpaired", f"{module[:200]!r} has no lora_{missing[0]}")
        a, b, e = (parts[part].shape for part in "ABE")
        if not (len(a) == len(b) == len(e) == 2 and a[0] == b[1] == e[0] and e[1] == 1):
            raise refuse("rank_mismatch", f"{module[:200]!r}: A is {a}, B is {b}, E is {e}")
        if module not in base.modules:
            raise refuse("unknown_module", f"{module[:200]!r} is not a linear module of {base.name}")
        if (b[0], a[1]) != base.modules[module]:
            raise refuse("shape_mismatch", f"{module}: B·A is {b[0]}×{a[1]}, in {base.name} it is another shape")
    return found


def _plain(parts: Mapping[str, Matrix], scale: float, rank: int) -> tuple[Matrix, Matrix]:
    """A' [rank, in] and B' [out, rank] of the module, padded with zeros."""
    singular = parts["E"][:, 0]
    root = np.sqrt(np.abs(singular) * np.float32(scale))
    padding = rank - len(singular)
    a = np.pad(root[:, None] * parts["A"], ((0, padding), (0, 0)))
    b = np.pad(parts["B"] * (np.sign(singular) * root), ((0, 0), (0, padding)))
    return np.ascontiguousarray(a, np.float32), np.ascontiguousarray(b, np.float32)


def _values(path: Path, span: TensorSpan) -> Matrix:
    count = math.prod(span.shape)
    with path.open("rb") as file:
        file.seek(span.offset)
        if span.dtype == "BF16":
            bits = np.fromfile(file, "<u2", count).astype("<u4") << 16
            return bits.view("<f4").reshape(span.shape)
        if span.dtype not in ("F32", "F16"):
            raise refuse("unsupported_dtype", f"a tensor is {span.dtype}")
        return np.fromfile(file, "<f4" if span.dtype == "F32" else "<f2", count).astype(np.float32).reshape(span.shape)
