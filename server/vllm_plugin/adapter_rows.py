"""Which rows of a batch carry an adapter, worked out once a step and used by every layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class AdapterRows:
    """Row numbers that have an adapter, and the slot of each. Rows not listed compute the base model."""

    total: int
    """How many rows the mapping speaks of."""
    rows: torch.Tensor
    slots: torch.Tensor

    @classmethod
    def of(cls, indices: torch.Tensor) -> AdapterRows:
        """From vLLM's mapping: the slot of each row, or -1 for no adapter."""
        rows = (indices >= 0).nonzero().squeeze(1)
        return cls(indices.numel(), rows, indices[rows])

    @property
    def none(self) -> bool:
        return bool(self.rows.numel() == 0)

    @property
    def every(self) -> bool:
        return bool(self.rows.numel() == self.total)
