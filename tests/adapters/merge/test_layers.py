"""Layer by layer a model says what it says when it is whole in memory, to the bit."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adapters.merge.layers import LayerByLayer, NotInLayers
from adapters.merge.models import NOTHING, Loading, Whole, log_probabilities
from adapters.merge.named_tensors import Computed, NamedTensors, in_files
from adapters.train.labels import Example
from tests.adapters.merge.models import load_model, save_model
from tests.flows.zoo import Case, lora, make, other

WORDS = [Example(tuple(range(1, length)), tuple(range(1, length)), False) for length in (9, 12, 5, 20, 7, 6, 15, 4, 11)]
TEXTS = {"task": WORDS, "general": WORDS[2:5]}
BATCHES = 4


@pytest.fixture(autouse=True)
def few_tokens_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that three rows of the task are in a batch."""
    monkeypatch.setattr("adapters.merge.models.BATCH_TOKENS", 64)


def said(
    way: Loading,
    path: Path,
    dtype: torch.dtype,
    changes: Mapping[str, Any] = NOTHING,
    adapter: Path | None = None,
    tensors: NamedTensors | None = None,
) -> dict[str, list[Tensor]]:
    found: dict[str, list[Tensor]] = {}
    loaded = way.of(path, tensors or in_files(path), dtype, changes, adapter)
    for name, rows, _ in log_probabilities(loaded, TEXTS, 0):
        found.setdefault(name, []).append(rows)
    return found


def assert_same(one: dict[str, list[Tensor]], other: dict[str, list[Tensor]]) -> None:
    assert one.keys() == other.keys() == TEXTS.keys()
    for name in TEXTS:
        for ours, theirs in zip(one[name], other[name], strict=True):
            assert torch.isfinite(ours).all()
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_base(tmp_path: Path, tied: bool, dtype: torch.dtype) -> None:
    path = save_model(tmp_path / "base", tied=tied, num_hidden_layers=3)
    assert_same(said(LayerByLayer(), path, dtype), said(Whole(), path, dtype))


ADAPTERS: dict[str, Case] = {
    "LoRA": lora(target_modules="all-linear"),
    "DoRA, which is defined by the base's weights": lora(use_dora=True),
    "IA3": other("IA3", None, target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "embedding and head, saved along": lora(None, target_modules=["embed_tokens", "lm_head"]),
    "a trained embedding": lora(None, modules_to_save=["embed_tokens"]),
    "trained tokens": lora(None, trainable_token_indices=[5, 6]),
}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_on_top(tmp_path: Path, name: str) -> None:
    path = save_model(tmp_path / "base", num_hidden_layers=2)
    make(ADAPTERS[name], load_model(path), tmp_path / "a")
    ways = [said(way, path, torch.float32, adapter=tmp_path / "a") for way in (LayerByLayer(), Whole())]
    assert_same(*ways)
    bare = said(Whole(), path, torch.float32)
    assert not torch.equal(ways[0]["task"][0], bare["task"][0])


def test_logits_that_are_capped_behind_the_head(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, Gemma2Config

    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 128}
    config = Gemma2Config(**shape, **heads, final_logit_softcapping=2.0, initializer_range=0.3)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(tmp_path / "capped")
    assert not LayerByLayer().of(tmp_path / "capped", in_files(tmp_path / "capped"), torch.float32).head_is_plain
    assert_same(*(said(way, tmp_path / "capped", torch.float32) for way in (LayerByLayer(), Whole())))


def test_each_tensor_is_asked_for_once_for_all_texts(tmp_path: Path) -> None:
    path = save_model(tmp_path / "base", tied=False, num_hidden_layers=2)
    asked: Counter[str] = Counter()
    lie = in_files(path)

    def read(name: str) -> Tensor:
        asked[name] += 1
        return lie[name]

    said(LayerByLayer(), path, torch.float32, tensors=Computed(lie, read))
    assert asked == dict.fromkeys(lie, 1)


def test_one_layer_is_there_at_a_time(tmp_path: Path) -> None:
    path = save_model(tmp_path / "base", num_hidden_layers=3)
    loaded = LayerByLayer().of(path, in_files(path), torch.float32)
    held: list[list[int]] = []

    def look(*_: object) -> None:
        stored = [layer.mlp.up_proj.weight.untyped_storage().nbytes() for layer in loaded.model.model.layers]
        held.append([number for number, size in enumerate(stored) if size > 4])

    for layer in loaded.model.model.layers:
        layer.mlp.register_forward_hook(look)
    list(log_probabilities(loaded, TEXTS, 0))
    assert held == [[layer] for layer in range(3) for _ in range(BATCHES)]
    assert all(each.untyped_storage().nbytes() <= 4 for each in loaded.model.parameters())


def test_files_that_name_their_weights_differently_are_for_the_whole(tmp_path: Path) -> None:
    path = save_model(tmp_path / "base", num_hidden_layers=1)
    lie = in_files(path)
    with pytest.raises(NotInLayers, match=r"name weights differently: model\.norm\.weight"):
        LayerByLayer().of(path, {name: lie[name] for name in lie if name != "model.norm.weight"}, torch.float32)


def test_files_that_are_quantised_are_for_the_whole(tmp_path: Path) -> None:
    path = save_model(tmp_path / "base", num_hidden_layers=1)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "any"}}))
    with pytest.raises(NotInLayers, match="base is quantised in its files"):
        LayerByLayer().written(path, torch.float32)


def test_what_is_used_without_being_called_is_for_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a norm whose weight somebody multiplies with on his own."""
    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaRMSNorm.__call__", lambda self, hidden: hidden)
    path = save_model(tmp_path / "base", num_hidden_layers=1)
    with pytest.raises(NotInLayers, match="is used without being called"):
        LayerByLayer().of(path, in_files(path), torch.float32)
