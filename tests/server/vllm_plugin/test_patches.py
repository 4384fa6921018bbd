"""The contract with vLLM: what is replaced is there as it was read, and the plugin acts only where it should."""

from __future__ import annotations

import inspect
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from server import vllm_plugin
from server.vllm_plugin import four_bit_layers, patches, slot_clearing
from server.vllm_plugin.patches import EngineMoved, Patch

pytest.importorskip("vllm")


def every_patch() -> list[Patch]:
    return vllm_plugin.all_patches()


@pytest.mark.usefixtures("patched_vllm")
@pytest.mark.parametrize("patch", every_patch(), ids=str)
def test_replaced_once_and_what_was_replaced_is_as_it_was_read(patch: Patch) -> None:
    patches.check(patch)
    assert patches.is_applied(patch)
    ours = patches._function(inspect.getattr_static(patches.owner(patch), patch.name))
    assert not hasattr(ours.__wrapped__, "replaces")


@pytest.mark.usefixtures("patched_vllm")
def test_names_leaned_on_without_replacing() -> None:
    from vllm.lora.ops import torch_ops
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    assert list(inspect.signature(CPUModelRunner._zero_block_ids).parameters) == ["self", "block_ids"]
    shrink = ["inputs", "lora_b_weights", "output_tensor", "lora_indices_tensor", "scaling"]
    assert list(inspect.signature(torch_ops.bgmv_shrink).parameters) == shrink
    expand = ["inputs", "lora_b_weights", "output_tensor", "lora_indices_tensor", "add_inputs"]
    assert list(inspect.signature(torch_ops.bgmv_expand).parameters) == expand


@pytest.mark.usefixtures("patched_vllm")
def test_active_and_registering_again_is_nothing() -> None:
    before = [inspect.getattr_static(patches.owner(patch), patch.name) for patch in every_patch()]
    vllm_plugin.register()
    assert vllm_plugin.is_active()
    assert before == [inspect.getattr_static(patches.owner(patch), patch.name) for patch in every_patch()]


@pytest.mark.usefixtures("patched_vllm")
def test_no_op_off_the_cpu_and_when_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.platforms import current_platform

    assert vllm_plugin.needed()
    monkeypatch.setenv("LORAPLEX_PLUGIN", "off")
    assert not vllm_plugin.needed()
    monkeypatch.delenv("LORAPLEX_PLUGIN")
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    assert not vllm_plugin.needed()
    assert vllm_plugin.is_active()


@pytest.mark.parametrize(("switch", "widened"), [(None, 1), ("on", 1), ("fixes", 0)])
def test_the_first_four_bit_layer_repairs_always_and_widens_unless_only_fixes_are_wanted(
    monkeypatch: pytest.MonkeyPatch, switch: str | None, widened: int
) -> None:
    if switch is not None:
        monkeypatch.setenv("LORAPLEX_PLUGIN", switch)
    calls: list[str] = []
    monkeypatch.setattr("adapters.nf4.repair_dequantize", lambda: calls.append("repair"))
    monkeypatch.setattr("server.vllm_plugin.fp32_products.widen_products", lambda: calls.append("widen"))
    four_bit_layers.linear_method(lambda layer, config: calls.append(f"stock {config}"))(object(), "config")
    assert calls == ["stock config", "repair", "widen"][: 2 + widened]


class Engine:
    """A class as vLLM might have it."""

    def first(self, x: int) -> int:
        return x

    def second(self) -> int:
        return 2

    third = "moved"


def patch_of(name: str, *parameters: str) -> Patch:
    return Patch(f"{__name__}:Engine", name, parameters, lambda stock: lambda *_: -1)


@pytest.mark.parametrize(
    "broken",
    [
        patch_of("second", "self", "x"),
        patch_of("gone", "self"),
        patch_of("third", "self"),
        replace(patch_of("second", "self"), owner="server.nowhere:Engine"),
    ],
    ids=str,
)
def test_a_moved_name_is_an_error_that_replaces_nothing(broken: Patch) -> None:
    with pytest.raises(EngineMoved, match=rf"cannot fix .*{broken.name}.* written for vLLM 0\.32\.0.* installed is"):
        patches.apply([patch_of("first", "self", "x"), broken])
    assert Engine().first(1) == 1


def test_importing_the_plugin_imports_nothing() -> None:
    """vLLM only logs an import error of a plugin and serves without it."""
    script = "import sys, server.vllm_plugin; print([n for n in ('vllm', 'torch', 'bitsandbytes') if n in sys.modules])"
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


class Slots:
    """A LoRA layer and a manager in one: remembers which slots were cleared."""

    def __init__(self, *lora_ids: int | None) -> None:
        self.lora_index_to_id: list[int | None] = list(lora_ids)
        self.cleared: list[int] = []
        self.modules: dict[str, Any] = {"layer": self}

    def reset_lora(self, slot: int) -> None:
        self.cleared.append(slot)

    def forget(self, lora_id: int) -> None:
        if lora_id in self.lora_index_to_id:
            self.lora_index_to_id[self.lora_index_to_id.index(lora_id)] = None

    def forget_all(self) -> None:
        self.lora_index_to_id = [None] * len(self.lora_index_to_id)


def test_deactivating_clears_the_slot_and_no_other() -> None:
    manager = Slots(7, 8, None)
    deactivate = slot_clearing.deactivate_adapter(Slots.forget)
    deactivate(manager, 8)
    deactivate(manager, 9)
    assert (manager.cleared, manager.lora_index_to_id) == ([1], [7, None, None])


def test_removing_all_clears_the_used_slots() -> None:
    manager = Slots(7, None, 8)
    slot_clearing.remove_all_adapters(Slots.forget_all)(manager)
    assert (manager.cleared, manager.lora_index_to_id) == ([0, 2], [None] * 3)
