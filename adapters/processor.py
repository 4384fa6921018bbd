"""What this machine's processor can do. torch is imported when a function runs."""

from __future__ import annotations


def multiplies_bf16() -> bool:
    """Whether it has instructions for bfloat16 matrix products: AVX512-BF16 or AMX, on ARM its BF16.

    Without them torch emulates bfloat16 in float32, several times slower than float32 itself.
    """
    import torch

    found = torch.cpu.get_capabilities()
    return any(found.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
