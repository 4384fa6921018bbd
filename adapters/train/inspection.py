"""What an adapter does to the base's weights, module by module: how much, in how many directions, and in which.

Any kind of adapter that is, or converts to, a plain LoRA. It needs no torch, and knows nothing of terminals.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from adapters.base import BaseModel
from adapters.base_weights import BaseWeights
from adapters.convert import convert
from adapters.convert.change import Factors, leading_vectors
from adapters.errors import InvalidAdapter, TrainError
from adapters.lora_weights import read_pairs
from adapters.peft_config import read_config
from adapters.tensor_values import Matrix, read_values
from adapters.upload import CONFIG, INITIAL, WEIGHTS

LARGEST_RANK = 512
IN_USE = 0.01
"""A direction counts as used when its singular value is at least this share of the largest."""
Vectors = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Found:
    """Of one module. Without the base's plain weights, what compares with them is nan."""

    module: str
    rank: int
    in_use: int
    """Singular values of at least a hundredth of the largest."""
    effective: float
    """(Σσ²)² / Σσ⁴: 1 when one direction does all of it, `rank` when all do the same."""
    singular_values: tuple[float, ...]
    change: float
    """‖ΔW‖ / ‖W‖, Frobenius."""
    overlap: float
    """Of the input directions in use with as many leading ones of W: ‖VᵀV_W‖² / k, from 0 to 1 (Hu et al. 2021,
    equation 4)."""
    chance: float
    """What the overlap of random directions would be: k / in_features."""
    amplification: float
    """‖ΔW‖ / ‖UᵀWV‖: how much more the adapter does along its own directions than W does (the same, table 7)."""


def inspect(adapter: Path, base: BaseModel, told: Callable[[int, int], None] = lambda done, of: None) -> list[Found]:
    """In the order of the modules. Raises TrainError for what is no LoRA, nor converts to one."""
    weights = BaseWeights(base)
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        changes = list(_changes(adapter, base, Path(scratch)))
        for number, (module, read) in enumerate(changes, start=1):
            weight = weights.weight(module) if weights.is_plain(f"{module}.weight") else None
            found.append(judge(module, read(), weight))
            told(number, len(changes))
    return found


def judge(module: str, change: Factors, weight: Matrix | None) -> Found:
    left, values, right = singular(change)
    in_use = int(np.count_nonzero(values > IN_USE * values[0])) if values[0] > 0 else 0
    size, inputs = float(np.linalg.norm(values)), change.a.shape[1]
    overlap = amplification = relative = float("nan")
    if weight is not None:
        full = weight.astype(np.float64)
        relative = size / float(np.linalg.norm(full))
        if in_use:
            mine = right[:, :in_use]
            overlap = float(np.sum((input_directions(full, in_use).T @ mine) ** 2)) / in_use
            along = float(np.linalg.norm(left[:, :in_use].T @ full @ mine))
            amplification = size / along if along else float("inf")
    shown = tuple(float(value) for value in values)
    effective = float(np.sum(values**2) ** 2 / np.sum(values**4)) if in_use else 0.0
    return Found(module, len(values), in_use, effective, shown, relative, overlap, in_use / inputs, amplification)


def singular(change: Factors) -> tuple[Vectors, Vectors, Vectors]:
    """U, σ, V of b·a, through the small square in the middle."""
    q, r = np.linalg.qr(change.b.astype(np.float64))
    p, s = np.linalg.qr(change.a.T.astype(np.float64))
    left, values, right = np.linalg.svd(r @ s.T)
    return q @ left, values, p @ right.T


def input_directions(weight: Vectors, count: int) -> Vectors:
    """The first right singular vectors [in_features, count]."""
    if weight.shape[0] > weight.shape[1]:
        return leading_vectors(weight.T, count)
    turned = weight.T @ leading_vectors(weight, count)
    return np.asarray(turned / np.linalg.norm(turned, axis=0))


def _changes(adapter: Path, base: BaseModel, scratch: Path) -> Iterator[tuple[str, Callable[[], Factors]]]:
    """Module → its ΔW, as a plain LoRA of whatever rank it takes."""
    for name in (CONFIG, WEIGHTS, INITIAL):
        if (adapter / name).is_file():
            shutil.copy(adapter / name, scratch / name)
    missing = [name for name in (CONFIG, WEIGHTS) if not (scratch / name).is_file()]
    if missing:
        raise TrainError(f"{adapter} has no {' and no '.join(missing)}; give a directory that save_pretrained wrote")
    try:
        verdict = convert(scratch, base, LARGEST_RANK, max_error=1.0)
        if verdict.merge_only:
            raise TrainError(f"{adapter} is no sum that can be taken apart: {verdict.merge_only}")
        config = read_config(scratch / CONFIG, LARGEST_RANK)
        pairs = read_pairs(scratch / WEIGHTS, base)
    except InvalidAdapter as error:
        raise TrainError(f"{adapter}: {error.message}", code=error.code) from error

    def reader(module: str, pair: Any) -> Callable[[], Factors]:
        def read() -> Factors:
            b = read_values(scratch / WEIGHTS, pair.b) * np.float32(config.scaling_of(module))
            return Factors(b, read_values(scratch / WEIGHTS, pair.a))

        return read

    for module, pair in pairs.items():
        yield module, reader(module, pair)
