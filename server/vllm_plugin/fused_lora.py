"""Slow: on a CPU vLLM gathers the adapter's matrices anew for every token, and multiplies each slice of a layer apart.

Faster: the matrices of a layer are laid out so that one product serves all its slices and every slot of the batch:

    A  [slots, slices * rank, in]     x·Aᵀ is the hidden part of all slices (q, k and v; gate and up) at once
    B  [slots, rank, out], a slice    as the second factor of a product, not transposed

A batch of one adapter is one product with A and one with each B. A small mixed batch multiplies with the matrices of
all its slots as one, and what belongs to another slot is set to zero between the two products: set, not multiplied, so
that an overflow in one adapter cannot reach its neighbours. Zero times an infinite B would: where there is one, as in a
long batch (prefill), it goes slot by slot.

vLLM's own tensors become views of this memory, with the shapes it knows: it fills and clears them as before, and no
slot is stored twice.

Small matrices are kept in fp32, whatever the engine's type: torch hands a bf16 product to oneDNN, and 14 µs pass before
that begins to multiply, where an fp32 product of a token is done in 3. From `SMALL` values on, reading twice the bytes
costs more than that. A batch of more than `MANY` rows casts them to bf16 and back to the fast product. Where the
processor emulates bf16 all are fp32, and stay so.

S-LoRA (Sheng et al. 2023) and Punica (Chen et al. 2023) describe the batching; these are its plain PyTorch form.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from server.vllm_plugin.adapter_rows import AdapterRows
from server.vllm_plugin.no_adapter_rows import WRAPPER
from server.vllm_plugin.patches import Patch
from server.vllm_plugin.slot_clearing import MANAGER

if TYPE_CHECKING:
    import torch

LONG = 64
"""Rows from which on a mixed batch goes slot by slot: the work wasted on other slots' columns outgrows the calls."""
SMALL = 1 << 17
"""Values of a matrix, rank * max(in, out), up to which it is kept in fp32: rank 16 for a width of 8,192."""
MANY = 32
"""Rows from which on a bf16 product of small matrices, cast first, is faster than one in fp32."""


class Slots:
    """A layer's matrices, of every slot."""

    def __init__(self, a: torch.Tensor, b: Sequence[torch.Tensor]) -> None:
        """a [slots, slices * rank, in]; b [slots, rank, out], one a slice."""
        from adapters.processor import multiplies_bf16

        self.a = a
        self.b = tuple(b)
        self.rank = b[0].shape[1]
        self.widths = [each.shape[2] for each in b]
        self.fast_bf16 = multiplies_bf16()
        self.infinite: set[int] = set()
        """Slots whose B may be infinite; the gate admits none, but scaling may overflow."""
        self.of = tuple((a[slot].t(), tuple(each[slot] for each in b)) for slot in range(a.shape[0]))
        """For each slot, the second factors of its products: Aᵀ [in, slices * rank], and B [rank, out] a slice."""

    def filled(self, slot: int) -> None:
        """Call it when vLLM has written to the slot."""
        finite = all(bool(each[slot].sum().isfinite()) for each in self.b)
        (self.infinite.discard if finite else self.infinite.add)(slot)

    def add(self, rows: AdapterRows, y: torch.Tensor, x: torch.Tensor) -> None:
        """y[row] += B[slot] · A[slot] · x[row] for every row that has a slot. y [rows, sum of outs], x [rows, in]."""
        if rows.only is not None:
            self._add_one(rows.only, y, x)
        elif rows.total <= LONG and not self.infinite.intersection(range(rows.present[0], rows.present[-1] + 1)):
            self._add_mixed(rows, y, x)
        else:
            for slot, numbers in rows.groups:
                part = y.index_select(0, numbers)
                self._add_one(slot, part, x.index_select(0, numbers))
                y.index_copy_(0, numbers, part)

    def _add_one(self, slot: int, y: torch.Tensor, x: torch.Tensor) -> None:
        """Every row has this slot."""
        a, b = self.of[slot]
        dtype = self._dtype(x)
        if a.dtype != dtype:
            a, b = a.to(dtype), tuple(each.to(dtype) for each in b)
        hidden = x.to(dtype) @ a
        self._expand(y, hidden.split_with_sizes([self.rank] * len(b), dim=1), b)

    def _add_mixed(self, rows: AdapterRows, y: torch.Tensor, x: torch.Tensor) -> None:
        """Rows of different adapters and of none, by the matrices of all slots from the first to the last there is."""
        first, last = rows.present[0], rows.present[-1]
        slots, slices, rank = last - first + 1, len(self.b), self.rank
        dtype = self._dtype(x)
        hidden = x.to(dtype) @ self.a[first : last + 1].view(-1, self.a.shape[2]).t().to(dtype)
        hidden.masked_fill_(rows.others(first, last, slices * rank), 0)
        by_slice = hidden.view(-1, slots, slices, rank).transpose(1, 2).reshape(-1, slices, slots * rank)
        b = [each[first : last + 1].view(slots * rank, -1).to(dtype) for each in self.b]
        self._expand(y, by_slice.unbind(1), b)

    def _expand(self, y: torch.Tensor, hidden: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> None:
        """y += hidden · B of every slice, side by side."""
        import torch

        parts = y.split_with_sizes(self.widths, dim=1)
        if y.dtype == b[0].dtype:
            for part, mine, each in zip(parts, hidden, b, strict=True):
                part.addmm_(mine, each)
        elif len(b) == 1 or y.shape[0] > MANY:  # a long buffer costs more than the additions it saves
            for part, mine, each in zip(parts, hidden, b, strict=True):
                part.add_(mine @ each)
        else:
            added = y.new_empty(y.shape, dtype=b[0].dtype)
            for part, mine, each in zip(added.split_with_sizes(self.widths, dim=1), hidden, b, strict=True):
                torch.mm(mine, each, out=part)
            y.add_(added)

    def _dtype(self, x: torch.Tensor) -> torch.dtype:
        """In which to multiply these rows."""
        return x.dtype if x.shape[0] > MANY and self.fast_bf16 else self.a.dtype


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

    slots, _, rank, inputs = a[0].shape
    dtype = _dtype(a[0].dtype, rank * max(inputs, *(each.shape[2] for each in b)))
    memory = torch.zeros(slots, len(a) * rank, inputs, dtype=dtype)
    memories = [torch.zeros(slots, rank, each.shape[2], dtype=dtype) for each in b]
    for number, (old_a, old_b) in enumerate(zip(a, b, strict=True)):
        memory[:, number * rank : (number + 1) * rank] = old_a[:, 0]
        memories[number].copy_(old_b[:, 0].transpose(1, 2))
    views_a = [part.unsqueeze(1) for part in memory.split(rank, dim=1)]
    views_b = [each.transpose(1, 2).unsqueeze(1) for each in memories]
    made = Slots(memory, memories)
    return Fused.of(views_a, made), Fused.of(views_b, made)


def _dtype(engine: torch.dtype, values: int) -> torch.dtype:
    import torch

    from adapters.processor import multiplies_bf16

    return torch.float32 if values <= SMALL or not multiplies_bf16() else engine


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
