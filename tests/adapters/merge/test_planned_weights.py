"""Tensors of a plan as models, beside the adapter as PEFT computes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.base import BaseModel
from adapters.merge.models import dense_model
from adapters.merge.plan import MergePlan, plan_merge
from adapters.merge.planned_weights import PlannedWeights
from adapters.merge.unmerged import with_adapter
from adapters.prequantized import prequantize
from tests.adapters.merge.conftest import random_adapter

IDS = torch.arange(40)[None]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


def both(plan: MergePlan) -> tuple[torch.Tensor, torch.Tensor]:
    """Merged, and unmerged on the same values; in fp32."""
    weights, values = PlannedWeights(plan), plan.choice.values
    merged, bare = (
        dense_model(plan.base.path, tensors, torch.float32, weights.config_changes)
        for tensors in (weights.merged(values), weights.base(values))
    )
    return logits(merged), logits(with_adapter(bare, plan.adapter, plan.base.path))


@pytest.mark.parametrize("values", ["dequantized", "original"])
def test_one_that_began_in_the_bases_own_directions(sure_base: Path, tmp_path: Path, values: Any) -> None:
    """PEFT alone, on NF4's values, would take its start out of those."""
    adapter = random_adapter(sure_base, tmp_path / "pissa", target_modules=["q_proj"], init_lora_weights="pissa")
    merged, unmerged = both(plan_merge(adapter, BaseModel.read(sure_base), values))
    assert torch.allclose(merged, unmerged, atol=1e-3)


def test_peft_agrees_where_the_values_are_those_that_it_began_in(sure_base: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapter = random_adapter(sure_base, tmp_path / "pissa", target_modules=["q_proj"], init_lora_weights="pissa")
    plain = AutoModelForCausalLM.from_pretrained(sure_base, dtype=torch.float32)
    theirs = logits(PeftModel.from_pretrained(plain, str(adapter)).eval())
    assert torch.allclose(both(plan_merge(adapter, BaseModel.read(sure_base), "original"))[1], theirs, atol=1e-3)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_a_head_that_parts_from_the_embedding(sure_base: Path, tmp_path: Path) -> None:
    adapter = random_adapter(sure_base, tmp_path / "head", target_modules=["lm_head", "q_proj"])
    merged, unmerged = both(plan_merge(adapter, BaseModel.read(sure_base), "original"))
    assert torch.allclose(merged, unmerged, atol=1e-3)


def test_a_base_that_is_packed_itself_has_no_original_values(
    sure_base: Path, sure_adapter: Path, tmp_path: Path
) -> None:
    base = BaseModel.read(sure_base)
    prequantize(base, tmp_path / "packed")
    packed = plan_merge(sure_adapter, BaseModel.read(tmp_path / "packed"))
    assert PlannedWeights(packed).bases == ("dequantized",)
    assert torch.allclose(both(packed)[0], both(plan_merge(sure_adapter, base, "dequantized"))[0], atol=1e-3)
