"""Packed examples against the same examples alone, in fp32, on a base with two heads and two layers."""

from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.errors import ConfigError
from adapters.train.config import TrainConfig
from adapters.train.labels import IGNORED, Example
from adapters.train.loop import backward
from adapters.train.model import Batch, check_packing, collate, loss_sum
from adapters.train.packing import pack

PAD = 2


def example(*ids: int, trained: int = 2) -> Example:
    labels = (*[IGNORED] * (len(ids) - trained), *ids[len(ids) - trained :])
    return Example(ids, labels, False, f"x:{ids[0]}", len(ids), (len(ids) - 1,))


ROWS = [example(11, 12, 13, 14, 15), example(21, 22, 23), example(31, 32, 33, 34), example(41, 42, 43, 44, 45, 46)]


@pytest.fixture(scope="module")
def model(small_base: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(small_base, dtype=torch.float32).eval()


def logits(model: Any, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return torch.as_tensor(model(**batch.inputs).logits)


def largest_difference(model: Any, batch: Batch, packs: list[Example]) -> float:
    """Between the logits of each example in its pack and alone."""
    found, together = 0.0, logits(model, batch)
    alone = {row.ids: logits(model, collate([row], PAD))[0] for row in ROWS}
    for row, packed in zip(together, packs, strict=True):
        start = 0
        for length in packed.parts:
            ids = packed.ids[start : start + length]
            found = max(found, float((row[start : start + length] - alone[ids]).abs().max()))
            start += length
    return found


def test_the_logits_of_packed_examples_are_those_of_each_alone(model: Any) -> None:
    packs = pack(ROWS, 10)
    assert sorted(packed.parts for packed in packs) == [(5, 3), (6, 4)]  # two widths: one row is padded
    batch = collate(packs, PAD)
    assert largest_difference(model, batch, packs) < 1e-5


def test_positions_begin_again_and_only_the_past_of_the_same_example_is_seen() -> None:
    batch = collate([pack(ROWS[1:3], 8)[0], example(61, 62, 63)], PAD)  # 4 and 3 tokens; 3 and padding
    assert batch.inputs["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2], [0, 1, 2, 0, 1, 2, 3]]
    assert batch.inputs["attention_mask"].shape == (2, 1, 7, 7)
    seen = batch.inputs["attention_mask"][0, 0].int().tolist()
    assert seen == [
        [1] * (n + 1) + [0] * (6 - n) if n < 4 else [0] * 4 + [1] * (n - 3) + [0] * (6 - n) for n in range(7)
    ]


def test_packing_without_the_mask_or_the_positions_would_be_seen(model: Any) -> None:
    """The test above can fail: the naive ways are far off."""
    packs = pack(ROWS, 10)
    batch = collate(packs, PAD)
    naive = Batch(batch.ids, batch.mask, batch.labels)
    assert largest_difference(model, naive, packs) > 1e-2


def test_the_loss_and_the_gradients_of_packs_are_those_of_the_rows(model: Any) -> None:
    text = Example((51, 52, 53, 54), (IGNORED, 52, 53, 54), False)
    rows = [*ROWS, text]
    weight = model.model.layers[0].self_attn.q_proj.weight
    losses, gradients = [], []
    for examples in (rows, pack(rows, 10)):
        model.zero_grad()
        losses.append(backward(model, [collate(examples, PAD)]))
        gradients.append(weight.grad.clone())
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert torch.allclose(gradients[0], gradients[1], atol=1e-6)
    assert gradients[0].abs().max() > 1e-4


def test_a_pack_keeps_every_token_end_and_place_and_fits() -> None:
    packs = pack(ROWS, 10)
    assert sorted(token for packed in packs for token in packed.ids) == sorted(t for row in ROWS for t in row.ids)
    assert all(len(packed.ids) <= 10 for packed in packs)
    for packed in packs:
        assert [packed.ids[end] % 10 for end in packed.ends] == list(packed.parts)
        assert packed.trained_tokens == 2 * len(packed.parts)
    assert pack(ROWS[::-1], 10)[0].ids == packs[0].ids


def test_many_rows_need_few_sequences() -> None:
    rows = [example(*range(100, 100 + length)) for length in range(3, 51) for _ in range(20)]
    tokens = sum(len(row.ids) for row in rows)
    assert len(pack(rows, 64)) <= 1.02 * -(-tokens // 64)


def test_a_base_whose_attention_mixes_rows_is_refused(model: Any) -> None:
    check_packing(model, 512)
    model.set_attn_implementation("eager")  # adds the mask to the scores: True is 1, and hides nothing
    try:
        with pytest.raises(ConfigError, match="the attention of this base mixes packed rows"):
            check_packing(model, 512)
    finally:
        model.set_attn_implementation("sdpa")


def test_a_base_with_a_short_window_is_refused(model: Any) -> None:
    model.config.sliding_window = 64
    try:
        with pytest.raises(ConfigError, match="sees 64 tokens back"):
            check_packing(model, 512)
    finally:
        del model.config.sliding_window


def test_a_packed_run_trains(config: TrainConfig) -> None:
    from adapters.train.recipe import load, read_material

    packed = config.model_copy(update={"data": config.data.model_copy(update={"packing": True})})
    setup = load(packed, read_material(packed))
    assert [len(example.parts) for example in setup.examples] == [3]
    alone = load(config, read_material(config))
    together = loss_sum(setup.model, collate(setup.examples, PAD)).item()
    assert together == pytest.approx(loss_sum(alone.model, collate(alone.examples, PAD)).item(), rel=2e-3)  # bf16
