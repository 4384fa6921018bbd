"""Loaded by vLLM itself in the API, engine and worker processes (`vllm.general_plugins`): defects fixed on the CPU.

One module a defect or a slow path, each of which says what is wrong and names what it replaces:

    no_adapter_rows   a request without an adapter is computed with a neighbour's, or with an unloaded one
    kv_zeroing        NaN left in freed KV blocks poisons whoever gets the block next
    slot_clearing     the weights of a removed adapter stay in their slot
    four_bit_layers   bitsandbytes dequantises some NF4 shapes wrongly; where the CPU has no bf16 instructions
                      its products are slow, and fp32_products is faster
    packed_nf4        every 4-bit product dequantises its weight first, where the CPU could multiply by the codes
    fused_lora        the adapters' matrices are gathered anew for every token, in hundreds of small products
    compiled          with LoRA the model is never compiled; and between a layer and its product lie ten calls
    norm_kernels      RMSNorm is computed in eight operators
    step_threads      all threads wait for each other after every operator, however small
    orphans           an engine whose server was killed lives on, on every platform

`patches` holds the machinery: every replaced name must exist with the signature that was read, else vLLM does not
start. On a platform that is not a CPU nothing is replaced. `LORAPLEX_PLUGIN=fixes` leaves out what only makes it
faster, `LORAPLEX_PLUGIN=off` disables all of it, to see vLLM as it comes; never serve like that.

vLLM logs and survives a plugin that fails to *import*, so nothing is imported here before `register` runs, and
`is_active` lets the server see that the fixes are in (VLLM_PLUGINS may have left this plugin out).
"""

from __future__ import annotations

import os
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from server.vllm_plugin.patches import Patch

SWITCH = "LORAPLEX_PLUGIN"


def register() -> None:
    """Apply every fix that this platform needs. Called by vLLM, maybe more than once in a process."""
    if _switch() != "off":
        from server.vllm_plugin.orphans import end_with_parent

        end_with_parent()
    if needed():
        _apply_once()


def needed() -> bool:
    """Whether this process should be patched: on the CPU platform, unless switched off."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu()) and _switch() != "off"


def makes_faster() -> bool:
    """Whether what only makes vLLM faster is wanted, too."""
    return _switch() not in ("off", "fixes")


def is_active() -> bool:
    """Whether this process has the fixes it needs; ask after the engine arguments were made. True off the CPU."""
    from server.vllm_plugin import patches

    return not needed() or all(patches.is_applied(patch) for patch in all_patches())


def all_patches() -> list[Patch]:
    """Everything that is replaced in vLLM and its bitsandbytes plugin, in no particular order."""
    from server.vllm_plugin import (
        compiled,
        four_bit_layers,
        fused_lora,
        kv_zeroing,
        no_adapter_rows,
        norm_kernels,
        packed_nf4,
        slot_clearing,
        step_threads,
    )

    fixes = (no_adapter_rows, kv_zeroing, slot_clearing, four_bit_layers)
    faster = (packed_nf4, fused_lora, compiled, norm_kernels, step_threads)
    modules = (*fixes, *faster) if makes_faster() else fixes
    return [patch for module in modules for patch in module.PATCHES]


def _switch() -> str:
    return os.environ.get(SWITCH, "").lower()


@cache
def _apply_once() -> None:
    from server.vllm_plugin import patches

    patches.apply(all_patches())
