from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.errors import MergeError
from adapters.merge.models import Whole, compute_type, dense_model, log_probabilities
from adapters.train.labels import IGNORED, Example
from tests.adapters.merge.peft_weights import PeftWeights

ROWS = (
    Example((5, 6, 7, 8), (IGNORED, IGNORED, 7, 8), False),
    Example((9, 10, 11), (IGNORED, 10, IGNORED), False),
)


@pytest.fixture
def weights(sure_base: Path, sure_adapter: Path) -> PeftWeights:
    return PeftWeights(sure_base, sure_adapter)


def test_named_tensors_become_the_model_that_they_were_read_from(sure_base: Path, weights: PeftWeights) -> None:
    from transformers import AutoModelForCausalLM

    built = dense_model(sure_base, weights.base("original"), torch.float32)
    loaded = AutoModelForCausalLM.from_pretrained(sure_base, dtype=torch.float32).eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(built(input_ids=ids).logits, loaded(input_ids=ids).logits)


def test_a_tensor_that_is_missing_is_refused(sure_base: Path, weights: PeftWeights) -> None:
    whole = weights.base("original")
    some = {name: whole[name] for name in whole if "layers.1.mlp.up_proj" not in name}
    with pytest.raises(MergeError, match=r"sure is not the model .*layers\.1\.mlp\.up_proj"):
        dense_model(sure_base, some, torch.float32)


def test_log_probabilities_are_those_of_the_trained_tokens_in_order(
    sure_base: Path, weights: PeftWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adapters.merge.models.CHUNK_BYTES", 2 * 4 * 49_152)  # two tokens at a time
    loaded = Whole().of(sure_base, weights.base("original"), torch.float32)
    heard: list[tuple[int, int]] = []
    chunks = list(log_probabilities(loaded, {"task": ROWS, "general": ROWS[:1]}, 2, lambda *done: heard.append(done)))
    assert [(name, tokens.tolist()) for name, _, tokens in chunks] == [
        ("task", [7, 8]),
        ("task", [10]),
        ("general", [7, 8]),
    ]
    assert heard == [(1, 2), (2, 2)]
    found = torch.cat([rows for name, rows, _ in chunks if name == "task"])
    assert torch.allclose(found, _expected(loaded.model), atol=1e-5)


def _expected(model: Any) -> torch.Tensor:
    """Row by row, without padding, from whole logits."""
    with torch.no_grad():
        first, second = (model(input_ids=torch.tensor([row.ids])).logits[0].log_softmax(-1) for row in ROWS)
    return torch.cat([first[1:3], second[0:1]])


def test_fp16_is_computed_in_fp32() -> None:
    assert compute_type("float16") == compute_type("float32") == torch.float32


def test_a_model_goes_when_nobody_holds_it_any_more(sure_base: Path, sure_adapter: Path, weights: PeftWeights) -> None:
    """Not at the next collection of garbage: two models would be held for a while."""
    gc.disable()
    try:
        loaded = Whole().of(sure_base, weights.base("original"), torch.float32, adapter=sure_adapter)
        list(log_probabilities(loaded, {"task": ROWS}, 2))
        left = weakref.ref(next(loaded.model.parameters()))
        del loaded
        assert left() is None
    finally:
        gc.enable()
