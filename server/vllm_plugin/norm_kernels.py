"""Slow: vLLM has kernels for RMSNorm on a CPU, but takes them for other devices only, and computes it in eight torch
operators.

Faster: the kernels, where the norm is the plain one. A compiled model has no use for them: torch fuses the operators.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from server.vllm_plugin.patches import Patch

if TYPE_CHECKING:
    import torch


def forward_cpu(stock: Callable[..., Any]) -> Callable[..., Any]:
    def forward_cpu(self: Any, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        """x / √(mean(x²) + ε) · weight (Zhang and Sennrich 2019), of x + residual where there is one."""
        import torch

        plain = self.has_weight and self.variance_size_override is None and x.dim() == 2 and x.is_contiguous()
        if not plain or self.weight.dtype != x.dtype or not (residual is None or residual.is_contiguous()):
            return stock(self, x, residual)
        kernels: Any = torch.ops._C
        if residual is None:
            out = torch.empty_like(x)
            kernels.rms_norm(out, x, self.weight.data, self.variance_epsilon)
            return out
        kernels.fused_add_rms_norm(x, residual, self.weight.data, self.variance_epsilon)
        return x, residual

    return forward_cpu


PATCHES = (
    Patch("vllm.model_executor.layers.layernorm:RMSNorm", "forward_cpu", ("self", "args", "kwargs"), forward_cpu),
)
