"""What an initialisation took from the base's weights: found again from the base, or read from the file that PEFT
saved before training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from adapters.convert.change import Factors, leading_vectors
from adapters.convert.source import Source
from adapters.peft_config import Scaling
from adapters.refusals import refuse
from adapters.upload import INITIAL


class Initial(Protocol):
    def factors(self, source: Source, module: str, scaling: Scaling) -> Factors:
        """s·B₀ and A₀ of the module."""


class Pissa:
    """The part of W in its first r singular directions (Meng et al. 2024): V·Vᵀ·W."""

    def factors(self, source: Source, module: str, scaling: Scaling) -> Factors:
        weight, rank = source.base_weights.weight(module), scaling.rank_of(module)
        wide = weight.shape[0] <= weight.shape[1]
        vectors = leading_vectors((weight if wide else weight.T).astype(np.float64), rank).astype(np.float32)
        return Factors(vectors, vectors.T @ weight) if wide else Factors(weight @ vectors, vectors.T)


class Olora:
    """s·Q·R, of W = Q·R the first r columns and rows (Büyükakyüz 2024)."""

    def factors(self, source: Source, module: str, scaling: Scaling) -> Factors:
        rank = scaling.rank_of(module)
        q, r = np.linalg.qr(source.base_weights.weight(module))
        return Factors(q[:, :rank] * np.float32(scaling.scaling_of(module)), r[:rank])


@dataclass(frozen=True)
class FromFile:
    """The adapter as it was before training, saved as a file of its own."""

    saved: Source

    def factors(self, source: Source, module: str, scaling: Scaling) -> Factors:
        rows, columns = source.base.modules[module]
        rank = scaling.rank_of(module)
        names = {"A": (rank, columns), "B": (rows, rank)}
        sides = []
        for side, shape in names.items():
            span = self.saved.spans.get(f"{module}.lora_{side}.weight")
            if span is None or span.shape != shape:
                got = "missing" if span is None else str(span.shape)
                raise refuse("rank_mismatch", f"{INITIAL}: lora_{side} of {module} is {got}, expected {shape}")
            sides.append(self.saved.values(span))
        return Factors(sides[1] * np.float32(scaling.scaling_of(module)), sides[0])


INITIALS: Mapping[str, Initial] = {"pissa": Pissa(), "olora": Olora()}
"""Those that the base's weights alone determine. The others draw random numbers, or look at data."""
