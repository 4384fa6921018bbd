"""Which rows of a batch carry an adapter, worked out once a step and used by every layer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

FEW = 32
"""Rows of one adapter up to which `kernels` computes them faster than matrix products do."""


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

    @cached_property
    def none(self) -> bool:
        return bool(self.rows.numel() == 0)

    @cached_property
    def every(self) -> bool:
        return bool(self.rows.numel() == self.total)

    @cached_property
    def groups(self) -> tuple[tuple[int, torch.Tensor | None], ...]:
        """Each slot that occurs, in order, with the numbers of its rows; None if it has every row."""
        present: list[int] = self.slots.unique().tolist()
        if self.every and len(present) == 1:
            return ((present[0], None),)
        return tuple((slot, self.rows[self.slots == slot]) for slot in present)

    @cached_property
    def long_groups(self) -> tuple[tuple[int, torch.Tensor | None], ...]:
        """Those of more than `FEW` rows."""
        return tuple((slot, rows) for slot, rows in self.groups if self._size(rows) > FEW)

    @cached_property
    def short_groups(self) -> npt.NDArray[np.int64]:
        """The others, row by row: row number and slot, ordered by slot. Shape [rows, 2]."""
        import torch

        short = torch.tensor([slot for slot, rows in self.groups if self._size(rows) <= FEW], dtype=self.slots.dtype)
        chosen = torch.isin(self.slots, short)
        rows, slots = self.rows[chosen], self.slots[chosen]
        order = slots.argsort(stable=True)
        pairs: npt.NDArray[np.int64] = torch.stack((rows[order], slots[order]), dim=1).long().contiguous().numpy()
        return pairs

    def _size(self, rows: torch.Tensor | None) -> int:
        return self.total if rows is None else rows.numel()
