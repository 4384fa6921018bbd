"""Defect: NaN in a freed KV block poisons the next request that is given the block.

Attention gives the positions beyond a request's last token the weight 0, and 0 * NaN is NaN. vLLM zeroes new blocks
only for Mamba and mixed-precision caches (vllm/v1/kv_cache_interface.py), so after one request whose adapter
overflowed, later requests for the base and for good adapters answer NaN until the block happens to be overwritten.

Fix: say that the cache needs zeroing. The scheduler then lists the new blocks and the CPU worker zeroes them, code
that vLLM has already: for full attention only, so a model with sliding-window layers is not covered.
"""

from __future__ import annotations

from typing import Any

from server.vllm_plugin.patches import Patch


def needs_kv_cache_zeroing(stock: property) -> property:
    def needs_kv_cache_zeroing(self: Any) -> bool:
        return True

    return property(needs_kv_cache_zeroing)


PATCHES = (
    Patch(
        "vllm.v1.kv_cache_interface:KVCacheConfig",
        "needs_kv_cache_zeroing",
        ("self",),
        needs_kv_cache_zeroing,
    ),
)
