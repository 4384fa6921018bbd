"""Slow: on a CPU vLLM gathers the adapter's matrices anew for every token, and multiplies each slice of a layer apart.

Faster: the matrices of a layer are laid out so that one product serves all its slices (q, k and v; gate and up):

    A  [slots, slices * rank, in]     x·Aᵀ is the hidden part of all slices at once
    B  [slots, rank, out], a slice    as the second factor of a product, not transposed

Rows are computed slot by slot, and nothing of one slot is ever multiplied with a row of another, so an overflow in one
adapter cannot reach its neighbours. A few rows, as in decoding, are one call for the whole layer and batch
(`kernels`), as long as the matrices are small; the rest are matrix products on all threads.

vLLM's own tensors become views of this memory, with the shapes it knows: it fills and clears them as before, and no
slot is stored twice. Where the processor emulates bf16 the matrices are kept in fp32, which it multiplies faster.

S-LoRA (Sheng et al. 2023) and Punica (Chen et al. 2023) describe the batching.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from server.vllm_plugin.adapter_rows import AdapterRows
from server.vllm_plugin.no_adapter_rows import WRAPPER
from server.vllm_plugin.patches import Patch
from server.vllm_plugin.slot_clearing import MANAGER

if TYPE_CHECKING:
    import torch

SMALL = 1 << 17
"""Values of a matrix, rank * max(in, out), up to which one thread is enough for it: rank 16 for a width of 8,192."""


class Slots:
    """A layer's matrices, of every slot."""

    def __init__(self, a: torch.Tensor, b: Sequence[torch.Tensor]) -> None:
        """a [slots, slices * rank, in]; b [slots, rank, out], one a slice."""
        from server.vllm_plugin import kernels

        self.a = a
        self.b = tuple(b)
        self.rank = b[0].shape[1]
        self.widths = [each.shape[2] for each in b]
        self.layout = kernels.layout(a, b)
        self.ranks = np.full((a.shape[0], len(b)), self.rank, dtype=np.int64)
        """Of each slot's adapter, a slice: what lies beyond is zero. Shape [slots, slices]."""
        self.dtype = a.dtype
        self.small = self.rank * max(a.shape[2], *self.widths) <= SMALL
        self.readable = kernels.multiplies(a.dtype, a.dtype)
        """By the kernels."""
        self._kernels = kernels

    def filled(self, slot: int) -> None:
        """Call it when vLLM has written to the slot."""
        if self.readable:
            self._kernels.find_ranks(self.layout, self.dtype, self.ranks, slot)

    def add(self, rows: AdapterRows, y: torch.Tensor, x: torch.Tensor) -> None:
        """y[row] += B[slot] · A[slot] · x[row] for every row that has a slot. y [rows, sum of outs], x [rows, in]."""
        groups = rows.groups
        if self.small and x.dtype == y.dtype and self._kernels.multiplies(x.dtype, self.dtype):
            if len(rows.short_groups):
                self._kernels.add(y, x.contiguous(), self.layout, self.dtype, self.ranks, rows.short_groups)
            groups = rows.long_groups
        for slot, numbers in groups:
            if numbers is None:
                self._add_one(slot, y, x)
            else:
                part = y.index_select(0, numbers)
                self._add_one(slot, part, x.index_select(0, numbers))
                y.index_copy_(0, numbers, part)

    def _add_one(self, slot: int, y: torch.Tensor, x: torch.Tensor) -> None:
        """Every row has this slot."""
        hidden = x.to(self.dtype) @ self.a[slot].t()
        parts = zip(
            y.split_with_sizes(self.widths, dim=1),
            hidden.split(self.rank, dim=1),
            (b[slot] for b in self.b),
            strict=True,
        )
        for part, mine, b in parts:
            if part.dtype == b.dtype:
                part.addmm_(mine, b)
            else:
                part.add_(mine @ b)


class Fused(tuple[Any, ...]):
    """What vLLM holds as a layer's stack: a view for each slice; and the memory they lie in."""

    slots: Slots

    @classmethod
    def of(cls, views: Sequence[torch.Tensor], slots: Slots) -> Fused:
        made = cls(views)
        made.slots = slots
        return made


def create_lora_weights(stock: Callable[..., None]) -> Callable[..., None]:
    def create_lora_weights(self: Any, *arguments: Any, **more: Any) -> None:
        stock(self, *arguments, **more)
        if not (self.lora_config.fully_sharded_loras or isinstance(self.lora_a_stacked, Fused)):
            self.lora_a_stacked, self.lora_b_stacked = fuse(self.lora_a_stacked, self.lora_b_stacked)

    return create_lora_weights


def activate_adapter(stock: Callable[..., bool]) -> Callable[..., bool]:
    def activate_adapter(self: Any, lora_id: int) -> bool:
        filled = stock(self, lora_id)
        if filled:
            slot = self.lora_index_to_id.index(lora_id)
            for module in self.modules.values():
                if isinstance(stack := getattr(module, "lora_b_stacked", None), Fused):
                    stack.slots.filled(slot)
        return filled

    return activate_adapter


def fuse(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> tuple[Fused, Fused]:
    """vLLM's stacks of a layer, A [slots, 1, rank, in] and B [slots, 1, out, rank] a slice, laid out anew."""
    import torch

    from adapters.processor import multiplies_bf16
    from server.vllm_plugin import kernels

    slots, _, rank, inputs = a[0].shape
    dtype = a[0].dtype if multiplies_bf16() else torch.float32
    memory = torch.zeros(slots, len(a) * rank, inputs, dtype=dtype)
    memories = [torch.zeros(slots, rank, each.shape[2], dtype=dtype) for each in b]
    for number, (old_a, old_b) in enumerate(zip(a, b, strict=True)):
        memory[:, number * rank : (number + 1) * rank] = old_a[:, 0]
        memories[number].copy_(old_b[:, 0].transpose(1, 2))
    views_a = [part.unsqueeze(1) for part in memory.split(rank, dim=1)]
    views_b = [each.transpose(1, 2).unsqueeze(1) for each in memories]
    if kernels.multiplies(a[0].dtype, dtype):
        kernels.warm_up(a[0].dtype, dtype)
    made = Slots(memory, memories)
    return Fused.of(views_a, made), Fused.of(views_b, made)


def add_lora_linear(stock: Callable[..., None]) -> Callable[..., None]:
    def add_lora_linear(
        self: Any,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: Any,
        lora_b_stacked: Any,
        scale: float,
        output_slices: tuple[int, ...],
        **more: Any,
    ) -> None:
        rows: AdapterRows = self.token_rows
        if rows.none:
            return
        if isinstance(lora_a_stacked, Fused) and scale == 1.0 and x.shape[0] == rows.total:
            lora_a_stacked.slots.add(rows, y, x)
        else:
            stock(self, y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, **more)

    return add_lora_linear


LAYER = "vllm.lora.layers.base_linear:BaseLinearLayerWithLoRA"
MERGED = "vllm.lora.layers.column_parallel_linear:MergedColumnParallelLinearWithLoRA"
CREATE = ("self", "max_loras", "lora_config", "model_config")

PATCHES = (
    Patch(LAYER, "create_lora_weights", CREATE, create_lora_weights),
    Patch(MERGED, "create_lora_weights", CREATE, create_lora_weights),
    Patch(MANAGER, "activate_adapter", ("self", "lora_id"), activate_adapter),
    Patch(
        WRAPPER,
        "add_lora_linear",
        ("self", "y", "x", "lora_a_stacked", "lora_b_stacked", "scale", "output_slices", "buffer", "kwargs"),
        add_lora_linear,
    ),
)
