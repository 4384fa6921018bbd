"""Which rows of a batch carry an adapter, worked out once a step and used by every layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
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
    indices: torch.Tensor
    """The slot of every row, -1 for none. Shape [total]."""
    _masks: dict[tuple[int, int, int], torch.Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, indices: torch.Tensor) -> AdapterRows:
        """From vLLM's mapping: the slot of each row, or -1 for no adapter."""
        rows = (indices >= 0).nonzero().squeeze(1)
        return cls(indices.numel(), rows, indices[rows], indices)

    @cached_property
    def none(self) -> bool:
        return bool(self.rows.numel() == 0)

    @cached_property
    def every(self) -> bool:
        return bool(self.rows.numel() == self.total)

    @cached_property
    def only(self) -> int | None:
        """The slot that every row has, if there is such a one."""
        return self.present[0] if self.every and len(self.present) == 1 else None

    @cached_property
    def present(self) -> tuple[int, ...]:
        """The slots that occur, in order."""
        return tuple(self.slots.unique().tolist())

    @cached_property
    def groups(self) -> tuple[tuple[int, torch.Tensor], ...]:
        """Each slot that occurs, with the numbers of its rows."""
        return tuple((slot, self.rows[self.slots == slot]) for slot in self.present)

    def others(self, first: int, last: int, width: int) -> torch.Tensor:
        """True where a column does not belong to the row's slot: each of the slots `first` to `last` has `width`
        columns. Shape [total, (last - first + 1) * width]."""
        import torch

        key = (first, last, width)
        if key not in self._masks:
            columns = torch.arange(first, last + 1).repeat_interleave(width)
            self._masks[key] = self.indices[:, None] != columns[None, :]
        return self._masks[key]
