from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from adapters.errors import InvalidAdapter, NotMergeable
from adapters.merge.plan import plan_merge
from tests.adapters.merge.by_hand import Q, base_of_ones, rank_one, written


def test_every_tensor_of_the_base_has_a_place_and_what_happens_to_it(tmp_path: Path) -> None:
    plan = plan_merge(rank_one(tmp_path / "a"), base_of_ones(tmp_path), "original")
    assert [each.name for each in plan.changed] == [f"{Q}.weight"]
    assert plan.kind == "lora"
    assert {each.shard for each in plan.planned} == {"model.safetensors"}
    assert len(plan.planned) == 7
    assert plan.size_bytes == 2 * (2 * (64 + 128) + 2 * 32 + 8)


def test_the_digest_is_that_of_what_will_be_written(tmp_path: Path) -> None:
    base = base_of_ones(tmp_path)
    rank_one(tmp_path / "a")
    rank_one(tmp_path / "b", lora_alpha=2)
    one = plan_merge(tmp_path / "a", base, "original").digest
    assert plan_merge(tmp_path / "a", base, "original").digest == one
    others = [
        plan_merge(tmp_path / "b", base, "original").digest,
        plan_merge(tmp_path / "a", base, "dequantized").digest,
        plan_merge(tmp_path / "a", base, "original", "float16").digest,
    ]
    assert len({one, *others}) == 4


def test_a_shape_that_does_not_fit_is_found_before_a_value_is_read(tmp_path: Path) -> None:
    pair = {f"{Q}.lora_A.weight": [[float("nan")] * 7], f"{Q}.lora_B.weight": [[1.0]] * 8}
    with pytest.raises(InvalidAdapter) as refused:
        plan_merge(written(tmp_path / "a", pair, r=1), base_of_ones(tmp_path), "original")
    assert refused.value.code == "shape_mismatch"


def test_the_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    adapter = rank_one(tmp_path / "a")
    (adapter / "loraplex.json").write_text('{"base_fingerprint": "sha256:another"}')
    with pytest.raises(InvalidAdapter) as refused:
        plan_merge(adapter, base_of_ones(tmp_path), "original")
    assert refused.value.code == "wrong_base"


def test_rows_for_both_ends_and_a_lora_for_one_are_refused(tmp_path: Path) -> None:
    tensors = {
        "model.embed_tokens.token_adapter.trainable_tokens_delta": np.ones((1, 8)),
        "lm_head.lora_A.weight": np.ones((1, 8)),
        "lm_head.lora_B.weight": np.ones((4, 1)),
    }
    adapter = written(tmp_path / "a", tensors, r=1, trainable_token_indices=[2])
    plan = plan_merge(adapter, base_of_ones(tmp_path / "two"), "original")
    assert {each.name: each.operation.kind for each in plan.changed if each.operation} == {
        "model.embed_tokens.weight": "tokens",
        "lm_head.weight": "lora",
    }
    with pytest.raises(NotMergeable, match="which are one here"):
        plan_merge(adapter, base_of_ones(tmp_path / "one", tie_word_embeddings=True), "original")
