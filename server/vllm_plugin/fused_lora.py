"""Slow: on a CPU vLLM gathers the adapter's matrices anew for every token, and multiplies each slice of a layer apart.

Faster: the matrices of a layer are laid out so that one product serves all its slices and every slot of the batch:

    A  [slots, slices * rank, in]     x·Aᵀ is the hidden part of all slices (q, k and v; gate and up) at once
    B  [slots, rank, out], a slice    as the second factor of a product, not transposed

A batch of one adapter is one product with A and one with each B. A small mixed batch multiplies with the matrices of
all its slots as one, and what belongs to another slot is set to zero between the two products: set, not multiplied, so
that an overflow in one adapter cannot reach its neighbours. A long one (prefill) goes slot by slot.

vLLM's own tensors become views of this memory, with the shapes it knows: it fills and clears them as before, and no
slot is stored twice. Where the processor emulates bf16 the slots are fp32, and so are the products.

S-LoRA (Sheng et al. 2023) and Punica (Chen et al. 2023) describe the batching; these are its plain PyTorch form.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from server.vllm_plugin.adapter_rows import AdapterRows
from server.vllm_plugin.no_adapter_rows import WRAPPER
from server.vllm_plugin.patches import Patch

if TYPE_CHECKING:
    import torch

LONG = 64
"""Rows from which on a mixed batch goes slot by slot: the work wasted on other slots' columns outgrows the calls."""


class Fused(tuple[Any, ...]):
    """What vLLM holds as a layer's stack: a view for each slice; and the memory they lie in."""

    memory: Any

    @classmethod
    def of(cls, views: Sequence[torch.Tensor], memory: Any) -> Fused:
        made = cls(views)
        made.memory = memory
        return made


def create_lora_weights(stock: Callable[..., None]) -> Callable[..., None]:
    def create_lora_weights(self: Any, *arguments: Any, **more: Any) -> None:
        stock(self, *arguments, **more)
        if not (self.lora_config.fully_sharded_loras or isinstance(self.lora_a_stacked, Fused)):
            self.lora_a_stacked, self.lora_b_stacked = fuse(self.lora_a_stacked, self.lora_b_stacked)

    return create_lora_weights


def fuse(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> tuple[Fused, Fused]:
    """vLLM's stacks of a layer, A [slots, 1, rank, in] and B [slots, 1, out, rank] a slice, laid out anew."""
    import torch

    from adapters.processor import multiplies_bf16

    slots, _, rank, inputs = a[0].shape
    dtype = a[0].dtype if multiplies_bf16() else torch.float32
    memory = torch.zeros(slots, len(a) * rank, inputs, dtype=dtype)
    memories = [torch.zeros(slots, rank, each.shape[2], dtype=dtype) for each in b]
    for number, (old_a, old_b) in enumerate(zip(a, b, strict=True)):
        memory[:, number * rank : (number + 1) * rank] = old_a[:, 0]
        memories[number].copy_(old_b[:, 0].transpose(1, 2))
    views_a = [part.unsqueeze(1) for part in memory.split(rank, dim=1)]
    views_b = [each.transpose(1, 2).unsqueeze(1) for each in memories]
    return Fused.of(views_a, memory), Fused.of(views_b, memories)


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
            add(rows, y, x, lora_a_stacked.memory, lora_b_stacked.memory)
        else:
            stock(self, y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, **more)

    return add_lora_linear


def add(rows: AdapterRows, y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: Sequence[torch.Tensor]) -> None:
    """y[row] += B[slot] · A[slot] · x[row] for every row that has a slot. y [rows, sum of outs], x [rows, in]."""
    x = x.to(a.dtype)
    if rows.every and len(rows.present) == 1:
        _one(y, x, a[rows.present[0]], [each[rows.present[0]] for each in b])
    elif rows.total <= LONG:
        _mixed(rows, y, x, a, b)
    else:
        for slot, numbers in rows.groups:
            part = y.index_select(0, numbers)
            _one(part, x.index_select(0, numbers), a[slot], [each[slot] for each in b])
            y.index_copy_(0, numbers, part)


def _one(y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: Sequence[torch.Tensor]) -> None:
    """All rows have the adapter of a [slices * rank, in] and b [rank, out] a slice."""
    hidden = x @ a.t()
    rank = b[0].shape[0]
    start = 0
    for number, each in enumerate(b):
        _accumulate(y.narrow(1, start, each.shape[1]), hidden.narrow(1, number * rank, rank), each)
        start += each.shape[1]


def _mixed(rows: AdapterRows, y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: Sequence[torch.Tensor]) -> None:
    """Rows of different adapters and of none, by the matrices of all slots from the first to the last that occurs."""
    first, last = rows.present[0], rows.present[-1]
    slots, slices, rank = last - first + 1, len(b), b[0].shape[1]
    hidden = x @ a[first : last + 1].reshape(-1, a.shape[2]).t()
    hidden.masked_fill_(rows.others(first, last, slices * rank), 0)
    by_slice = hidden.view(-1, slots, slices, rank)
    start = 0
    for number, each in enumerate(b):
        out = each.shape[2]
        mine = by_slice[:, :, number].reshape(-1, slots * rank)
        _accumulate(y.narrow(1, start, out), mine, each[first : last + 1].reshape(slots * rank, out))
        start += out


def _accumulate(y: torch.Tensor, hidden: torch.Tensor, b: torch.Tensor) -> None:
    if y.dtype == b.dtype:
        y.addmm_(hidden, b)
    else:
        y.add_(hidden @ b)


LAYER = "vllm.lora.layers.base_linear:BaseLinearLayerWithLoRA"
MERGED = "vllm.lora.layers.column_parallel_linear:MergedColumnParallelLinearWithLoRA"
CREATE = ("self", "max_loras", "lora_config", "model_config")

PATCHES = (
    Patch(LAYER, "create_lora_weights", CREATE, create_lora_weights),
    Patch(MERGED, "create_lora_weights", CREATE, create_lora_weights),
    Patch(
        WRAPPER,
        "add_lora_linear",
        ("self", "y", "x", "lora_a_stacked", "lora_b_stacked", "scale", "output_slices", "buffer", "kwargs"),
        add_lora_linear,
    ),
)
