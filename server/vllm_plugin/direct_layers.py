"""Slow: between the call of a layer with LoRA and its product lie ten Python calls, and a step has a hundred layers.

Faster: where the weight is packed NF4 and the slots are fused, as they mostly are, everything is looked up once, and a
few rows are one call of `kernels`. Every other layer and every other kind of input goes vLLM's way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from server.vllm_plugin.fused_lora import Fused, Slots
from server.vllm_plugin.packed_nf4 import PackedWeight

if TYPE_CHECKING:
    import torch


class Direct:
    """A layer: its packed weight, its slots, and vLLM's wrapper, which knows the adapters of the step."""

    def __init__(self, packed: PackedWeight, slots: Slots, wrapper: Any) -> None:
        from server.vllm_plugin import kernels

        self.packed = packed
        self.slots = slots
        self.wrapper = wrapper
        self.out, self.dtype = packed.codes.shape[0], packed.scales.dtype
        self.layout = packed.layout
        self.in_one_call = slots.small and kernels.multiplies(self.dtype, slots.dtype)
        self._multiply_and_add = kernels.multiply_and_add

    @classmethod
    def of(cls, layer: Any) -> Direct | None:
        """None unless it is a layer of this kind."""
        packed = getattr(layer.base_layer, "packed_nf4", None)
        if packed is None or not isinstance(layer.lora_a_stacked, Fused):
            return None
        return cls(packed, layer.lora_a_stacked.slots, layer.punica_wrapper)

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor | None:
        """x [rows, in] → [rows, out]; None for what must go vLLM's way."""
        rows = self.wrapper.token_rows
        if bias is not None or x.dim() != 2 or x.dtype != self.dtype or not (rows.none or x.shape[0] == rows.total):
            return None
        slots = self.slots
        if self.in_one_call and not rows.long_groups and x.stride(1) == 1:
            y = x.new_empty((x.shape[0], self.out))
            self._multiply_and_add(y, x, self.layout, slots.layout, slots.dtype, slots.ranks, rows.short_groups)
            return y
        y = self.packed @ x
        if not rows.none:
            slots.add(rows, y, x)
        return y


def call(layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> Any:
    """What `BaseLinearLayerWithLoRA._apply_sync` does."""
    try:
        direct = layer.direct
    except AttributeError:
        direct = layer.direct = Direct.of(layer)
    product = None if direct is None else direct(x, bias)
    return layer._apply_sync(x, bias) if product is None else product
