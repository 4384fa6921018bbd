"""Defect: deactivating an adapter only forgets its slot number; its weights stay in the slot.

With `no_adapter_rows` nothing reads a slot that no adapter owns, so this is the second lock on the same door: a
removed adapter's weights are gone from the slots when its removal returns, and NaN never waits in one for a kernel
that multiplies by a mask. Safe for re-activation, which writes every module of the slot anew.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from server.vllm_plugin.patches import Patch


def deactivate_adapter(stock: Callable[..., None]) -> Callable[..., None]:
    def deactivate_adapter(self: Any, lora_id: int) -> None:
        slot = self.lora_index_to_id.index(lora_id) if lora_id in self.lora_index_to_id else None
        stock(self, lora_id)
        if slot is not None:
            _clear(self, slot)

    return deactivate_adapter


def remove_all_adapters(stock: Callable[..., None]) -> Callable[..., None]:
    """vLLM's own drops the whole table without deactivating anything."""

    def remove_all_adapters(self: Any) -> None:
        used = [slot for slot, lora_id in enumerate(self.lora_index_to_id) if lora_id is not None]
        stock(self)
        for slot in used:
            _clear(self, slot)

    return remove_all_adapters


def _clear(manager: Any, slot: int) -> None:
    for module in manager.modules.values():
        module.reset_lora(slot)
        if hasattr(module, "reset_module_to_save"):  # a classification head keeps a full weight as well
            module.reset_module_to_save(slot)


MANAGER = "vllm.lora.model_manager:LoRAModelManager"

PATCHES = (
    Patch(MANAGER, "_deactivate_adapter", ("self", "lora_id"), deactivate_adapter),
    Patch(MANAGER, "remove_all_adapters", ("self",), remove_all_adapters),
)
