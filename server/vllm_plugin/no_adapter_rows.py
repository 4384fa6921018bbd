"""Defect: on the CPU a row without an adapter is computed with the adapter in the last slot.

Such rows carry slot -1 (vllm/lora/punica_wrapper/utils.py:convert_mapping). The PyTorch kernels index the stacked
weights with it (vllm/lora/ops/torch_ops/lora_ops.py), and -1 is Python's last element. So a base request batched
with any adapter request answers with the adapter that is, or was before its removal, in the last slot; and an
adapter with an lm_head changes base requests that run alone, because `add_lora_logits` does not even have the
all-base guard. The CUDA kernels skip -1.

Fix: gather the rows that have an adapter, run vLLM's own kernels on those, put them back. The rows are found once a
step, when vLLM tells the wrapper the new mapping. Nothing is done when no row has an adapter, and vLLM's own code
runs when every row has one. `apply_lora_full_linear` is right as it comes: it discards the rows at -1.

Every use of the kernels goes through the methods below; a contract test lists the wrapper's methods.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from server.vllm_plugin.adapter_rows import AdapterRows
from server.vllm_plugin.patches import Patch

if TYPE_CHECKING:
    import torch

WRAPPER = "vllm.lora.punica_wrapper.punica_cpu:PunicaWrapperCPU"


def update_metadata(stock: Callable[..., None]) -> Callable[..., None]:
    def update_metadata(self: Any, *mapping: Any, **more: Any) -> None:
        stock(self, *mapping, **more)
        self.token_rows = AdapterRows.of(self.token_lora_indices)
        self.sampler_rows = AdapterRows.of(self.sampler_indices)

    return update_metadata


def apply_shrink(stock: Callable[..., None]) -> Callable[..., None]:
    def apply_shrink(self: Any, y: torch.Tensor, x: torch.Tensor, w_t_all: torch.Tensor, scale: float) -> None:
        if self.token_rows.every:
            stock(self, y, x, w_t_all, scale)
        elif not self.token_rows.none:
            _shrink(self.token_rows, y.view(-1, y.shape[-1]), x, w_t_all, scale)

    return apply_shrink


def apply_expand(stock: Callable[..., None]) -> Callable[..., None]:
    def apply_expand(
        self: Any,
        y: torch.Tensor,
        x: torch.Tensor,
        w_t_all: torch.Tensor,
        y_offset: int,
        y_slice_size: int,
        add_inputs: bool = True,
    ) -> None:
        if self.token_rows.every:
            stock(self, y, x, w_t_all, y_offset, y_slice_size, add_inputs)
        elif not self.token_rows.none:
            _expand(self.token_rows, y.narrow(1, y_offset, y_slice_size), x, w_t_all, add_inputs)

    return apply_expand


def add_lora_embedding(stock: Callable[..., None]) -> Callable[..., None]:
    def add_lora_embedding(
        self: Any,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        add_inputs: bool = True,
        **more: Any,
    ) -> None:
        if self.token_rows.every:
            stock(self, y, x, lora_b_stacked, add_inputs, **more)
        elif not self.token_rows.none:
            _expand(self.token_rows, y, x, lora_b_stacked, add_inputs)

    return add_lora_embedding


def add_lora_logits(stock: Callable[..., None]) -> Callable[..., None]:
    """Rows that are not the sampler's (log-probabilities of the prompt) have no mapping: they get no head adapter.

    vLLM fails on them with a shape error that ends the engine; adapters with a head are refused at the gate.
    """

    def add_lora_logits(
        self: Any,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        scale: float,
        *,
        buffer: torch.Tensor | None = None,
        **more: Any,
    ) -> None:
        import torch

        rows, y2, x2 = self.sampler_rows, y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
        if rows.none or x2.shape[0] != rows.total:
            return
        if rows.every:
            stock(self, y, x, lora_a_stacked, lora_b_stacked, scale, buffer=buffer, **more)
            return
        hidden = x2.new_zeros((x2.shape[0], lora_b_stacked.size(-1)), dtype=torch.float32)
        _shrink(rows, hidden, x2, lora_a_stacked, scale)
        _expand(rows, y2, hidden, lora_b_stacked, add_inputs=True)

    return add_lora_logits


def _shrink(rows: AdapterRows, y: torch.Tensor, x: torch.Tensor, weights: torch.Tensor, scale: float) -> None:
    """y[rows] = scale * x[rows] @ A[slot].T, by vLLM's kernel; the other rows of y are left alone."""
    from vllm.lora.ops.torch_ops import bgmv_shrink

    part = y.index_select(0, rows.rows)
    bgmv_shrink(x.index_select(0, rows.rows), weights, part, rows.slots, scale)
    y.index_copy_(0, rows.rows, part)


def _expand(rows: AdapterRows, y: torch.Tensor, x: torch.Tensor, weights: torch.Tensor, add_inputs: bool) -> None:
    """y[rows] (+)= x[rows] @ B[slot].T, by vLLM's kernel; the other rows of y are left alone."""
    from vllm.lora.ops.torch_ops import bgmv_expand

    part = y.index_select(0, rows.rows)
    bgmv_expand(x.index_select(0, rows.rows), weights, part, rows.slots, add_inputs)
    y.index_copy_(0, rows.rows, part)


PATCHES = (
    Patch(
        WRAPPER,
        "update_metadata",
        ("self", "mapping", "lora_index_to_id", "max_loras", "vocab_size", "kwargs"),
        update_metadata,
    ),
    Patch(WRAPPER, "_apply_shrink", ("self", "y", "x", "w_t_all", "scale"), apply_shrink),
    Patch(
        WRAPPER,
        "_apply_expand",
        ("self", "y", "x", "w_t_all", "y_offset", "y_slice_size", "add_inputs"),
        apply_expand,
    ),
    Patch(
        WRAPPER,
        "add_lora_embedding",
        ("self", "y", "x", "lora_b_stacked", "add_inputs", "kwargs"),
        add_lora_embedding,
    ),
    Patch(
        WRAPPER,
        "add_lora_logits",
        ("self", "y", "x", "lora_a_stacked", "lora_b_stacked", "scale", "buffer", "kwargs"),
        add_lora_logits,
    ),
)
