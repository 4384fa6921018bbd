"""Each kind in the zoo: merged weights give the logits that PEFT gives with the adapter beside them, in fp32."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters.base import BaseModel
from adapters.convert import convert
from adapters.errors import AdapterError, InvalidAdapter, NotMergeable
from adapters.gate import judge
from adapters.merge.apply import merged_tensors
from adapters.merge.plan import plan_merge
from tests.adapters.merge.by_hand import Q, base_of_ones, written
from tests.adapters.merge.models import load_model, logits, save_model, with_weights
from tests.flows.zoo import FEW, QUERY_VALUE, ZOO, Case, lora, make, other

pytest.importorskip("peft")
TOLERANCE = 1e-4
"""Of any logit; they are of the order of 1. Measured: see the test's output."""
REFUSED: dict[str, tuple[type[AdapterError], str]] = {
    "trained biases of lora_B": (NotMergeable, "not_mergeable"),
    "PiSSA, fast, without its start": (InvalidAdapter, "modified_base"),
    "trained tokens and a trained head": (InvalidAdapter, "trainable_tokens"),
    "prompt tuning": (InvalidAdapter, "changes_prompt"),
    "prefix tuning": (InvalidAdapter, "changes_prompt"),
    "P-tuning": (InvalidAdapter, "changes_prompt"),
    "activated LoRA": (InvalidAdapter, "alora"),
    "DoRA on the head that is the embedding": (NotMergeable, "not_mergeable"),
    "DoRA on the embedding": (NotMergeable, "not_mergeable"),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    return BaseModel.read(save_model(tmp_path_factory.mktemp("bases") / "random"))


@pytest.fixture(scope="module")
def pristine(base: BaseModel) -> Any:
    return load_model(base.path)


def fitting(case: Case) -> Case:
    """The same on a base of twelve layers."""
    layers = case.options.get("layers_to_transform")
    return (
        case if layers is None else Case(**{**vars(case), "options": {**case.options, "layers_to_transform": [0, 1]}})
    )


MORE: dict[str, Case] = {
    "VeRA whose matrices were not saved": other("Vera", None, r=16, save_projection=False, strength=0.5, **FEW),
    "LoKr on every linear layer": other("LoKr", None, r=4, alpha=8, target_modules="all-linear", strength=0.1),
    "IA3 that scales outputs alone": other("IA3", None, target_modules=["q_proj", "v_proj"], feedforward_modules=[]),
    "LoRA on embedding and head": lora(None, target_modules=["embed_tokens", "lm_head"]),
    "a trained head": lora(None, modules_to_save=["lm_head"], **FEW),
    "a trained embedding": lora(None, modules_to_save=["embed_tokens"], **FEW),
    "a trained embedding that is the head, too": lora(
        None, modules_to_save=["embed_tokens"], ensure_weight_tying=True, **FEW
    ),
    "a whole linear layer": lora(None, modules_to_save=["down_proj"], target_modules=QUERY_VALUE),
    "DoRA on the head that is the embedding": lora(None, use_dora=True, target_modules=["q_proj", "lm_head"]),
    "DoRA on the embedding": lora(None, use_dora=True, target_modules=["q_proj", "embed_tokens"]),
    "trained tokens, named": lora(None, trainable_token_indices={"embed_tokens": [7, 3]}),
    "trained tokens and a trained head": lora(None, trainable_token_indices=[5, 6], modules_to_save=["lm_head"]),
    "ranks by pattern on the embedding": lora(
        None, target_modules=["q_proj", "embed_tokens"], rank_pattern={"embed_tokens": 2}, use_rslora=True
    ),
}
CASES = {**ZOO, **MORE}


@pytest.mark.parametrize("name", CASES)
def test_merged_it_answers_as_it_did_beside_the_base(base: BaseModel, pristine: Any, tmp_path: Path, name: str) -> None:
    reference = make(fitting(CASES[name]), pristine, tmp_path / "saved")
    if name in REFUSED:
        kind, code = REFUSED[name]
        with pytest.raises(kind) as refused:
            plan_merge(tmp_path / "saved", base, "original", "float32")
        assert (type(refused.value), refused.value.code) == (kind, code)
        assert len(refused.value.message) > 40
        return
    plan = plan_merge(tmp_path / "saved", base, "original", "float32")
    merged = with_weights(base.path, dict(merged_tensors(plan)), **plan.changes_config)
    expected, idle = logits(reference), logits(pristine)
    off, moved = (logits(merged) - expected).abs().max().item(), (idle - expected).abs().max().item()
    print(f"{name}: {plan.kind}, {len(plan.changed)} tensors, |Δ logit| {off:.2g} at most; the base's {moved:.2g}")
    assert moved > 0.01
    assert off < TOLERANCE


KEPT = ["LoRA on the embedding", "LoRA on the head", "LoRA on embedding and head", "ranks by pattern on the embedding"]
KEPT += ["trained tokens", "trained tokens, named", "a trained head", "a trained embedding", "DoRA"]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", KEPT)
def test_the_gate_keeps_for_a_merge_what_a_merge_takes(tmp_path: Path, name: str, tied: bool) -> None:
    own = BaseModel.read(save_model(tmp_path / "base", tied=tied))
    make(fitting(CASES[name]), load_model(own.path), tmp_path / "a")
    sent = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    manifest = judge(tmp_path / "a", own, 16)
    assert manifest.merge_only is not None
    assert manifest.target_modules
    assert {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()} == sent, "as it was sent"
    assert plan_merge(tmp_path / "a", own).changed


@pytest.mark.parametrize("name", REFUSED)
def test_the_gate_refuses_what_no_merge_takes(base: BaseModel, pristine: Any, tmp_path: Path, name: str) -> None:
    make(fitting(CASES[name]), pristine, tmp_path / "a")
    with pytest.raises(InvalidAdapter) as refused:
        judge(tmp_path / "a", base, 16)
    assert refused.value.code == REFUSED[name][1]


@pytest.mark.parametrize("infix", ["original_module", "modules_to_save"])
def test_two_values_for_one_tensor_are_refused(base: BaseModel, pristine: Any, tmp_path: Path, infix: str) -> None:
    """PEFT would take one of them; which, depends on how it was saved."""
    make(CASES["a trained norm"], pristine, tmp_path / "a")
    path = tmp_path / "a/adapter_model.safetensors"
    tensors = load_file(path)
    (trained,) = (name for name in tensors if name.endswith("model.norm.weight"))
    save_file({**tensors, trained.replace("norm.", f"norm.{infix}."): tensors[trained] + 1}, path)
    for read in (partial(plan_merge, tmp_path / "a", base), partial(judge, tmp_path / "a", base, 16)):
        with pytest.raises(InvalidAdapter, match=r"are both to be model\.norm\.weight") as refused:
            read()
        assert refused.value.code == "unsupported_tensor"


def test_another_embedding_beside_the_adapter_is_no_copy(base: BaseModel, pristine: Any, tmp_path: Path) -> None:
    """PEFT would load it, and compute with it."""
    make(CASES["LoRA on the embedding"], pristine, tmp_path / "a")
    path = tmp_path / "a/adapter_model.safetensors"
    tensors = load_file(path)
    (copy,) = (name for name in tensors if name.endswith("embed_tokens.base_layer.weight"))
    save_file({**tensors, copy: tensors[copy].to(torch.float16)}, path)
    assert judge(tmp_path / "a", base, 16).merge_only, "rounded, it is a copy all the same"
    save_file({**tensors, copy: tensors[copy] + 0.5}, path)
    with pytest.raises(InvalidAdapter, match="is not what random has there") as refused:
        judge(tmp_path / "a", base, 16)
    assert refused.value.code == "not_mergeable"
    with pytest.raises(InvalidAdapter, match=r"embed_tokens\.base_layer\.weight' is not what random has") as refused:
        plan_merge(tmp_path / "a", base)
    assert refused.value.code == "not_mergeable"


def test_a_copy_of_a_layer_takes_nothing_from_its_adapter(tmp_path: Path) -> None:
    """As a file that somebody else wrote may have it; every weight of the base is 1."""
    base = base_of_ones(tmp_path)
    pair = {f"{Q}.lora_A.weight": np.ones((1, 8)), f"{Q}.lora_B.weight": np.ones((8, 1))}
    for value, code in ((1.0, None), (2.0, "not_mergeable")):
        adapter = written(tmp_path / str(value), {**pair, f"{Q}.base_layer.weight": np.full((8, 8), value)}, r=1)
        if code is None:
            (changed,) = plan_merge(adapter, base, "original").changed
            assert changed.operation is not None
            assert (changed.name, changed.operation.kind) == (f"{Q}.weight", "lora")
            continue
        with pytest.raises(InvalidAdapter) as refused:
            plan_merge(adapter, base, "original")
        assert refused.value.code == code


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("modules", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]], ids=str)
def test_embedding_and_head_are_two_only_where_they_have_to_be(
    base: BaseModel, tmp_path: Path, modules: list[str], tied: bool
) -> None:
    own = base if tied else BaseModel.read(save_model(tmp_path / "untied", tied=False, num_hidden_layers=1))
    make(lora(None, target_modules=modules), load_model(own.path), tmp_path / "a")
    plan = plan_merge(tmp_path / "a", own, "original")
    assert plan.changes_config == ({"tie_word_embeddings": False} if tied else {})
    assert {each.name for each in plan.changed} == {
        name for name in ("model.embed_tokens.weight", "lm_head.weight") if name.split(".")[-2] in modules
    }
    assert [each.name for each in plan.planned].count("lm_head.weight") == 1
    assert any("one in the base and two" in note for note in plan.notes) == tied


def test_one_lora_for_two_ends_is_refused(base: BaseModel, pristine: Any, tmp_path: Path) -> None:
    case = lora(None, target_modules=["embed_tokens", "q_proj"])
    make(case, pristine, tmp_path / "a")
    path = tmp_path / "a/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"ensure_weight_tying": True}))
    with pytest.raises(NotMergeable, match="ensure_weight_tying"):
        plan_merge(tmp_path / "a", base, "original")


@pytest.mark.parametrize("name", ["IA3", "OFT", "BOFT", "HRA", "FourierFT"])
def test_what_peft_would_not_read_is_refused_before_a_value_is(
    base: BaseModel, pristine: Any, tmp_path: Path, name: str
) -> None:
    make(fitting(ZOO[name]), pristine, tmp_path / "a")
    path = tmp_path / "a/adapter_model.safetensors"
    tensors = load_file(path)
    spoiled = next(iter(tensors))
    tensors[spoiled] = torch.cat([tensors[spoiled], tensors[spoiled]])
    save_file(tensors, path)
    with pytest.raises(InvalidAdapter) as refused:
        plan_merge(tmp_path / "a", base, "original")
    assert refused.value.code == "shape_mismatch"


def test_what_was_sent_is_merged_and_not_the_lora_near_it(base: BaseModel, pristine: Any, tmp_path: Path) -> None:
    reference = make(fitting(ZOO["DoRA"]), pristine, tmp_path / "a")
    assert convert(tmp_path / "a", base, 16, max_error=1.0).conversion["exact"] is False
    plan = plan_merge(tmp_path / "a", base, "original", "float32")
    assert plan.kind == "dora"
    assert any("those that were sent" in note for note in plan.notes)
    merged = with_weights(base.path, dict(merged_tensors(plan)))
    assert (logits(merged) - logits(reference)).abs().max().item() < TOLERANCE


def test_weights_that_lie_the_other_way_round_are_refused(base: BaseModel, pristine: Any, tmp_path: Path) -> None:
    make(lora(None), pristine, tmp_path / "a")
    path = tmp_path / "a/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fan_in_fan_out": True}))
    with pytest.raises(NotMergeable, match="Conv1D"):
        plan_merge(tmp_path / "a", base, "original")


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_trained_tokens_leave_the_two_ends_as_they_are(tmp_path: Path, tied: bool) -> None:
    """A row for both where they are one; where they are two, a row of the embedding."""
    own = BaseModel.read(save_model(tmp_path / "base", tied=tied, num_hidden_layers=1))
    model = load_model(own.path)
    reference = make(lora(None, trainable_token_indices=[5, 6], strength=0.5), model, tmp_path / "a")
    plan = plan_merge(tmp_path / "a", own, "original", "float32")
    assert plan.changes_config == {}
    found = dict(merged_tensors(plan))
    assert ("lm_head.weight" in found) != tied
    changed = (found["model.embed_tokens.weight"] != model.model.embed_tokens.weight).any(dim=1)
    assert changed.nonzero().ravel().tolist() == [5, 6]
    assert (logits(with_weights(own.path, found)) - logits(reference)).abs().max().item() < TOLERANCE


@pytest.mark.parametrize("indices", [[5], [5, 5], [5, 500], [5, -1], "all", {"lm_head": [5, 6]}], ids=str)
def test_tokens_that_do_not_fit_are_refused(base: BaseModel, pristine: Any, tmp_path: Path, indices: Any) -> None:
    make(lora(None, trainable_token_indices=[5, 6]), pristine, tmp_path / "a")
    path = tmp_path / "a/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"trainable_token_indices": indices}))
    with pytest.raises(InvalidAdapter) as refused:
        plan_merge(tmp_path / "a", base, "original")
    assert refused.value.code in ("bad_config", "shape_mismatch")


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("OFT", "num_cayley_neumann_terms", {"x": "y"}),
        ("OFT", "num_cayley_neumann_terms", 10**9),
        ("OFT", "oft_block_size", "x"),
        ("BOFT", "boft_block_size", 0),
        ("HRA", "rank_pattern", [1]),
        ("FourierFT", "scaling", None),
        ("FourierFT", "n_frequency_pattern", True),
    ],
)
def test_options_that_peft_stumbles_over_are_refused(
    base: BaseModel, pristine: Any, tmp_path: Path, name: str, option: str, value: object
) -> None:
    make(fitting(ZOO[name]), pristine, tmp_path / "a")
    path = tmp_path / "a/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {option: value}))
    with pytest.raises(InvalidAdapter, match=r"PEFT cannot put|a whole number up to") as refused:
        list(merged_tensors(plan_merge(tmp_path / "a", base, "original")))
    assert refused.value.code == "bad_config"
