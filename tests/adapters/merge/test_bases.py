from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.base import BaseModel
from adapters.errors import MergeError
from adapters.merge import bases
from adapters.merge.apply import merged_tensors
from adapters.merge.bases import BaseChoice, choose_base, weights_of
from adapters.merge.plan import plan_merge
from adapters.nf4 import repair_dequantize
from adapters.prequantized import prequantize
from tests.adapters.merge.by_hand import base_of_ones, rank_one
from tests.adapters.merge.models import load_model, logits, save_model, with_weights
from tests.flows.zoo import ATTENTION, lora, make

peft = pytest.importorskip("peft")
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    return BaseModel.read(save_model(tmp_path_factory.mktemp("bases") / "random", num_hidden_layers=2))


def recorded(adapter: Path, **record: Any) -> Path:
    adapter.mkdir(exist_ok=True)
    (adapter / "loraplex.json").write_text(json.dumps(record))
    return adapter


@pytest.mark.parametrize(
    ("record", "values", "reason"),
    [
        ({"quantization": {"load_in_4bit": True}}, "dequantized", "trained on the base in 4 bits"),
        ({"quantization": None}, "original", "16 or 32 bits"),
        ({"scores": {}}, "dequantized", "NF4 is what serves it here"),
        (
            {"quantization": {"load_in_4bit": True, "bnb_4bit_use_double_quant": False}},
            "dequantized",
            "without double quantisation",
        ),
    ],
)
def test_auto_goes_by_what_it_was_trained_on(tmp_path: Path, record: Any, values: str, reason: str) -> None:
    choice = choose_base(recorded(tmp_path / "a", **record), base_of_ones(tmp_path))
    assert choice.values == values
    assert reason in choice.reason


def test_what_is_asked_for_is_taken(tmp_path: Path) -> None:
    adapter = recorded(tmp_path / "a", quantization=None)
    assert choose_base(adapter, base_of_ones(tmp_path), "dequantized") == BaseChoice("dequantized", "asked for")


@pytest.mark.parametrize("shape", [(64, 64), (128, 576), (96, 96), (49, 130), (3, 7)])
def test_nf4_values_are_those_of_bitsandbytes_to_the_bit(shape: tuple[int, int], monkeypatch: Any) -> None:
    from bitsandbytes import functional

    repair_dequantize()
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    packed, state = functional.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    state.dtype = torch.float32
    expected = functional.dequantize_4bit(packed, state)
    assert torch.equal(bases.nf4_values(weight), expected)
    monkeypatch.setattr(bases, "CHUNK", 1024)
    assert torch.equal(bases.nf4_values(weight), expected)


def test_a_base_that_lies_packed_gives_the_same_values_and_no_others(base: BaseModel, tmp_path: Path) -> None:
    prequantize(base, tmp_path / "nf4")
    packed = BaseModel.read(tmp_path / "nf4")
    assert packed.modules == base.modules
    for module in base.modules:
        ours = weights_of(base, "dequantized").weight(module)
        assert (weights_of(packed, "dequantized").weight(module) == ours).all()
    choice = choose_base(recorded(tmp_path / "a", quantization=None), packed)
    assert choice.values == "dequantized"
    assert "no other values" in choice.reason
    with pytest.raises(MergeError, match="quantised in the checkpoint itself"):
        choose_base(tmp_path / "a", packed, "original")
    other = save_model(tmp_path / "gptq", num_hidden_layers=1)
    config = json.loads((other / "config.json").read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(MergeError, match="quantised by gptq") as refused:
        choose_base(tmp_path / "a", BaseModel.read(other))
    assert refused.value.code == "packed_base"


def in_4_bits(base: BaseModel) -> Any:
    from transformers import BitsAndBytesConfig

    repair_dequantize()
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = load_model(base.path, quantization_config=nf4)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_a_qlora_merge_is_the_model_that_was_trained(base: BaseModel, tmp_path: Path, options: Any) -> None:
    """Its 4-bit layers with the adapter beside them, as bitsandbytes and PEFT compute them in fp32."""
    model = in_4_bits(base)
    case = lora(target_modules=ATTENTION, **options)
    with torch.no_grad():
        torch.manual_seed(0)
        live = peft.get_peft_model(model, peft.LoraConfig(**case.options))
        for name, parameter in live.named_parameters():
            if "lora_" in name:
                parameter.data += 0.02 * torch.randn_like(parameter)
    live.save_pretrained(tmp_path / "a")
    expected = logits(live.eval())
    plan = plan_merge(tmp_path / "a", base, "dequantized", "float32")
    off = (logits(with_weights(base.path, dict(merged_tensors(plan)))) - expected).abs().max().item()
    original = plan_merge(tmp_path / "a", base, "original", "float32")
    other = (logits(with_weights(base.path, dict(merged_tensors(original)))) - expected).abs().max().item()
    print(f"|Δ logit| on the dequantized base {off:.2g}, on the original one {other:.2g}")
    assert off < 1e-5
    assert other > 0.01


def test_a_merge_into_a_packed_base_is_one_into_the_base_it_came_from(base: BaseModel, tmp_path: Path) -> None:
    prequantize(base, tmp_path / "nf4")
    make(lora(), load_model(base.path), tmp_path / "a")
    packed = plan_merge(tmp_path / "a", BaseModel.read(tmp_path / "nf4"))
    plain = plan_merge(tmp_path / "a", base, "dequantized")
    ours, expected = dict(merged_tensors(packed)), dict(merged_tensors(plain))
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], each) for name, each in expected.items())


def test_only_what_nf4_touches_is_decoded(tmp_path: Path) -> None:
    plan = plan_merge(rank_one(tmp_path / "a"), base_of_ones(tmp_path), "dequantized")
    assert {each.name for each in plan.planned if not each.decoded} == {
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.norm.weight",
    }
    assert dict(merged_tensors(plan))[f"{Q}.weight"][:, 0].tolist() == [1.5, *[1.0] * 7]
