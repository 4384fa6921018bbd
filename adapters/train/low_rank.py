"""The LoRA product without peft's copies: x·Aᵀ·Bᵀ in the type of x, on top of the base layer's result in place.

peft computes it in fp32, so every layer keeps an fp32 copy of its input until the backward pass: a third of what a step
holds. Here A and B, which are small, are cast instead, as the server does; their gradients and values stay fp32. It
knows plain LoRA only: what is not that keeps peft's own forward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor

PLAIN = {"Linear", "Linear4bit"}
"""Classes of peft whose forward is base(x) + scaling · B(A(dropout(x)))."""


def use_low_rank_products(model: Any) -> int:
    """Give every plain LoRA layer of `model` the product below; how many there are."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer) and _is_plain(module)]
    for layer in layers:
        layer.forward = _forward_of(layer, layer.forward)
    return len(layers)


def _is_plain(layer: Any) -> bool:
    return (
        type(layer).__name__ in PLAIN
        and set(layer.lora_A) == {"default"}
        and not layer.lora_variant
        and layer.lora_A["default"].bias is None
        and layer.lora_B["default"].bias is None
    )


def _forward_of(layer: Any, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    a, b = layer.lora_A["default"], layer.lora_B["default"]
    dropout = layer.lora_dropout["default"]

    def forward(x: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        if layer.disable_adapters or layer.merged or arguments or keywords:
            return original(x, *arguments, **keywords)
        scaling = layer.scaling["default"]
        added: Tensor = _AddLowRank.apply(layer.base_layer(x), dropout(x), a.weight, b.weight, scaling)
        return added

    return forward


class _AddLowRank(torch.autograd.Function):  # type: ignore[misc]
    """base + scaling · x·Aᵀ·Bᵀ; x [..., in], A [r, in], B [out, r]. Keeps x as it is and x·Aᵀ."""

    @staticmethod
    def forward(ctx: Any, base: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        low = flat @ a.to(x.dtype).T
        ctx.save_for_backward(x, low, a, b)
        ctx.scaling = scaling
        ctx.mark_dirty(base)
        base.view(-1, base.shape[-1]).addmm_(low, b.to(x.dtype).T, alpha=scaling)
        return base

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, low, a, b = ctx.saved_tensors
        flat = gradient.reshape(-1, gradient.shape[-1])
        of_low = (flat @ b.to(x.dtype)).mul_(ctx.scaling)
        of_a = (of_low.T @ x.reshape(-1, x.shape[-1])).to(a.dtype) if ctx.needs_input_grad[2] else None
        of_b = (flat.T @ low).to(b.dtype).mul_(ctx.scaling) if ctx.needs_input_grad[3] else None
        of_x = (of_low @ a.to(x.dtype)).view(x.shape) if ctx.needs_input_grad[1] else None
        return gradient, of_x, of_a, of_b, None
