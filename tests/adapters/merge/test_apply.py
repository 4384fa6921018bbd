from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from adapters.errors import Conflict, MergeError
from adapters.merge.apply import merged_tensors, write_merged
from adapters.merge.plan import plan_merge
from tests.adapters.factories import tensor
from tests.adapters.merge.by_hand import Q, base_of_ones, rank_one


def test_the_answer_is_the_one_known_by_hand(tmp_path: Path) -> None:
    plan = plan_merge(rank_one(tmp_path / "a"), base_of_ones(tmp_path), "original")
    write_merged(plan, tmp_path / "out")
    found = load_file(tmp_path / "out/model.safetensors")
    expected = torch.ones(8, 8, dtype=torch.bfloat16)
    expected[0] = 1.5
    assert torch.equal(found.pop(f"{Q}.weight"), expected)
    assert all(torch.equal(each, torch.ones_like(each)) for each in found.values())
    assert {each.dtype for each in found.values()} == {torch.bfloat16}


def test_it_is_computed_in_fp32_and_rounded_once(tmp_path: Path) -> None:
    """1 + 2⁻⁹ + 2⁻⁹ is 1 in bfloat16 when it is rounded after each term."""
    adapter = rank_one(tmp_path / "a")
    rank_one(tmp_path / "a", lora_alpha=2 * (1 + 2**-7))  # ΔW = 1 + 2⁻⁷, the sum 2 + 2⁻⁷: halfway between two values
    plan = plan_merge(adapter, base_of_ones(tmp_path), "original")
    assert dict(merged_tensors(plan))[f"{Q}.weight"][0, 0] == torch.tensor(2 + 2**-7).bfloat16()
    assert dict(merged_tensors(plan, dtype="float32"))[f"{Q}.weight"][0, 0] == 2 + 2**-7


def test_the_directory_says_what_it_is_and_every_sum_is_right(tmp_path: Path) -> None:
    base = base_of_ones(tmp_path, torch_dtype="float32", quantization="no")
    plan = plan_merge(rank_one(tmp_path / "a"), base, "original", "float16")
    record = write_merged(plan, tmp_path / "out")
    out = tmp_path / "out"
    assert json.loads((out / "loraplex-merge.json").read_text()) == record
    assert (record["base"]["fingerprint"], record["plan"]) == (base.fingerprint, plan.digest)
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "float16"
    lines = [line.split("  ") for line in (out / "SHA256SUMS").read_text().splitlines()]
    listed = {name: hexed for hexed, name in lines}
    there = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.iterdir()}
    there.pop("SHA256SUMS")
    assert listed == there
    assert {"tokenizer.json", "chat_template.jinja", "README.md"} < set(there)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_what_is_there_stays_and_the_same_merge_is_done_already(tmp_path: Path) -> None:
    plan = plan_merge(rank_one(tmp_path / "a"), base_of_ones(tmp_path), "original")
    first = write_merged(plan, tmp_path / "out")
    assert write_merged(plan, tmp_path / "out") == first
    (tmp_path / "full").mkdir()
    (tmp_path / "full/kept").touch()
    with pytest.raises(Conflict):
        write_merged(plan, tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["kept"]


def test_values_that_the_type_cannot_hold_are_refused_and_nothing_is_left(tmp_path: Path) -> None:
    base = base_of_ones(tmp_path, {f"{Q}.weight": tensor(np.full((8, 8), 1e5), "BF16")})
    plan = plan_merge(rank_one(tmp_path / "a"), base, "original", "float16")
    with pytest.raises(MergeError, match="use bfloat16"):
        write_merged(plan, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "ones"]


def test_a_check_that_fails_ends_the_merge_before_anybody_sees_it(tmp_path: Path) -> None:
    plan = plan_merge(rank_one(tmp_path / "a"), base_of_ones(tmp_path), "original")

    def refuse(directory: Path) -> dict[str, float]:
        assert (directory / "config.json").is_file()
        raise MergeError("too far off")

    with pytest.raises(MergeError):
        write_merged(plan, tmp_path / "out", check=refuse)
    assert not (tmp_path / "out").exists()
    record = write_merged(plan, tmp_path / "out", check=lambda directory: {"kl": 0.0})
    assert record["fidelity"] == {"kl": 0.0}
