from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from adapters.base import BaseModel
from server.engine import memory_plan
from server.engine.memory_plan import MIB, MemoryPlan, free_on_machine, plan_of, plan_of_merge
from server.errors import MergedEngineRefused
from server.settings import Settings
from tests.adapters.factories import Tensor, tensor, write_base

SETTINGS = Settings(kv_cache_memory_bytes=3 * MIB, max_num_seqs=2, dtype="bfloat16")
TINY: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 16}
STEP = 2048 * (6 * 8 + 3 * 16) * 2 + 3 * 4 * 2 * 4


def write(path: Path, tensors: dict[str, Tensor]) -> Path:
    write_base(path, tensors, **TINY)
    return path


def test_the_terms_are_those_of_the_headers_and_the_settings(tmp_path: Path) -> None:
    weight, norm = tensor([[1.0] * 8] * 4), tensor([1.0] * 8, "BF16")
    plan = plan_of(write(tmp_path / "m", {"model.layers.0.q_proj.weight": weight, "model.norm.weight": norm}), SETTINGS)
    assert plan.terms == {
        "weights": (4 * 8 + 8) * 2,
        "KV cache": 3 * MIB,
        "for a step": STEP,
        "for the process": memory_plan.PROCESS_BYTES["cpu"],
    }
    assert plan.total == sum(plan.terms.values())


def test_packed_codes_lie_as_they_are_and_double_quantised_scales_are_unfolded(tmp_path: Path) -> None:
    state = json.dumps({"shape": [4, 64]}).encode()
    packed = {
        "model.layers.0.q_proj.weight": Tensor("U8", (128, 1), bytes(128)),
        "model.layers.0.q_proj.weight.absmax": Tensor("U8", (4,), bytes(4)),
        "model.layers.0.q_proj.weight.nested_absmax": Tensor("F32", (1,), bytes(4)),
        "model.layers.0.q_proj.weight.quant_state.bitsandbytes__nf4": Tensor("U8", (len(state),), state),
    }
    directory = write(tmp_path / "m", packed)
    assert plan_of(directory, SETTINGS).terms["weights"] == 128 + 4 * 4 + 4 + len(state)
    merge = plan_of_merge(BaseModel.read(directory), SETTINGS)
    assert merge.terms["weights"] == 4 * 64 * 2, "what is merged into it has 16 bits"


def test_a_plain_base_takes_as_much_merged_as_it_has_weights(tmp_path: Path) -> None:
    base = BaseModel.read(write_base(tmp_path / "m", **TINY))
    assert plan_of_merge(base, SETTINGS).terms == plan_of(base.path, SETTINGS).terms


def test_in_nf4_a_linear_weight_takes_half_a_byte_and_a_scale_in_fp32_for_each_block(tmp_path: Path) -> None:
    weight, norm = Tensor("BF16", (4, 64), bytes(512)), tensor([1.0] * 8, "BF16")
    base = BaseModel.read(write(tmp_path / "m", {"model.layers.0.q_proj.weight": weight, "model.norm.weight": norm}))
    merge = plan_of_merge(base, SETTINGS, quantised=True)
    assert merge.terms["weights"] == 4 * 64 // 2 + 4 * 4 + 8 * 2


def test_what_does_not_fit_is_refused_with_the_whole_sum() -> None:
    plan = MemoryPlan({"weights": 2 << 30, "KV cache": 1 << 30})
    plan.require(4 << 30, 1 << 30)
    with pytest.raises(MergedEngineRefused) as refused:
        plan.require((4 << 30) - 1, 1 << 30)
    assert refused.value.code == "engine_does_not_fit"
    assert "2.00 GiB weights + 1.00 GiB KV cache = 3.00 GiB, and 1.00 GiB must stay free" in refused.value.message


def test_the_kv_cache_is_as_large_as_the_base_engines_unless_it_is_told() -> None:
    assert Settings().merged_kv_cache_bytes == 1 << 30
    assert Settings(kv_cache_memory_bytes=5).merged_kv_cache_bytes == 5
    assert Settings(kv_cache_memory_bytes=5, merged_kv_cache_memory_bytes=7).merged_kv_cache_bytes == 7
    assert Settings(device="cuda").merged_kv_cache_bytes == 4 << 30


def test_a_cgroup_that_allows_less_than_the_machine_has_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_plan, "CGROUP", tmp_path)
    machine = free_on_machine()
    assert machine > 0
    (tmp_path / "memory.max").write_text("3000000\n")
    (tmp_path / "memory.current").write_text("2500000\n")
    (tmp_path / "memory.stat").write_text("anon 2100000\ninactive_file 400000\n")
    assert free_on_machine() == 3_000_000 - 2_500_000 + 400_000
    (tmp_path / "memory.max").write_text("max\n")
    assert free_on_machine() == pytest.approx(machine, rel=0.5)
