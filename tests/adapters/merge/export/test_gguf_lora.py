"""An adapter as a GGUF LoRA: the matrices known by hand, and llama.cpp's answer with it beside PEFT's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file

from adapters.base import BaseModel
from adapters.errors import InvalidAdapter, NotExportable
from adapters.merge.export import llama_cpp
from adapters.merge.export.gguf_lora import plan_lora, write_lora
from adapters.merge.export.gguf_model import plan_gguf, write_model
from adapters.merge.export.origin import Origin
from adapters.merge.export.parity import compare
from adapters.merge.export.reader import load
from tests.adapters.merge.export.tiny import VOCABULARY, save_adapter, save_model, save_tokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    return BaseModel.read(save_tokenizer(save_model(tmp_path_factory.mktemp("base"))))


def written(adapter: Path, base: BaseModel, path: Path) -> GGUFReader:
    write_lora(plan_lora(adapter, base, "f32", Origin("tiny")), path)
    return GGUFReader(path)


def test_rows_of_b_are_in_pairs_for_q_and_k_and_all_else_as_it_was(base: BaseModel, tmp_path: Path) -> None:
    adapter = save_adapter(base.path, tmp_path / "adapter", r=4, lora_alpha=8)
    file = written(adapter, base, tmp_path / "lora.gguf")
    tensors = {tensor.name: tensor.data for tensor in file.tensors}
    prefix = "base_model.model.model.layers.1."
    source = {name: value.numpy() for name, value in load_file(adapter / "adapter_model.safetensors").items()}
    b = source[f"{prefix}self_attn.k_proj.lora_B.weight"]
    assert np.array_equal(tensors["blk.1.attn_k.weight.lora_b"][:4], b[[0, 8, 1, 9]])
    for theirs, ours in {
        "attn_k.weight.lora_a": "self_attn.k_proj.lora_A",
        "attn_v.weight.lora_b": "self_attn.v_proj.lora_B",
        "ffn_gate.weight.lora_b": "mlp.gate_proj.lora_B",
    }.items():
        assert np.array_equal(tensors[f"blk.1.{theirs}"], source[f"{prefix}{ours}.weight"]), theirs
    assert len(tensors) == len(source) == 2 * 2 * 7
    expected = {
        "general.type": "adapter",
        "general.architecture": "llama",
        "adapter.type": "lora",
        "adapter.lora.alpha": 8,
    }
    assert {key: file.fields[key].contents() for key in expected} == expected


def test_what_alpha_over_rank_does_not_say_is_in_b(base: BaseModel, tmp_path: Path) -> None:
    """rsLoRA with rank 4 and alpha 8 scales by 4, where llama.cpp divides 8 by 4; v has rank 2 and alpha 6."""
    patterns: dict[str, Any] = {"use_rslora": True, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 6}}
    adapter = save_adapter(base.path, tmp_path / "adapter", r=4, lora_alpha=8, **patterns)
    tensors = {tensor.name: tensor.data for tensor in written(adapter, base, tmp_path / "lora.gguf").tensors}
    source = load_file(adapter / "adapter_model.safetensors")
    for name, module, factor in [
        ("attn_output", "o_proj", 8 / 2 / (8 / 4)),
        ("attn_v", "v_proj", 6 / 2**0.5 / (8 / 2)),
    ]:
        b = source[f"base_model.model.model.layers.0.self_attn.{module}.lora_B.weight"].numpy()
        assert np.allclose(tensors[f"blk.0.{name}.weight.lora_b"], factor * b, rtol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"r": 4, "lora_alpha": 8},
        {"r": 4, "lora_alpha": 8, "use_rslora": True, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 6}},
    ],
    ids=["plain", "rslora with patterns"],
)
def test_llama_cpp_adds_it_as_peft_does(base: BaseModel, tmp_path: Path, options: dict[str, Any]) -> None:
    pytest.importorskip("xllamacpp", reason="llama.cpp is not installed: uv pip install xllamacpp")
    adapter = save_adapter(base.path, tmp_path / "adapter", **options)
    model, lora = tmp_path / "base.gguf", tmp_path / "lora.gguf"
    write_model(plan_gguf(base, "f32", Origin("tiny")), model)
    written(adapter, base, lora)
    tokens = [1, *np.random.default_rng(0).integers(5, 400, 40).tolist()]
    places = list(range(1, len(tokens)))

    alone, adapted = (load(base.path, each).rows(tokens, places) for each in (None, adapter))
    with llama_cpp.loaded(model, VOCABULARY, lora) as reader:
        found = reader.rows(tokens, places)

    assert compare(adapted, found, tokens[1:]).kl < 1e-4
    assert compare(alone, found, tokens[1:]).kl > 0.1


def test_what_is_no_plain_lora_is_refused(base: BaseModel, tmp_path: Path) -> None:
    adapter = save_adapter(base.path, tmp_path / "dora", r=4, use_dora=True)
    with pytest.raises(InvalidAdapter) as refused:
        plan_lora(adapter, base, "f32", Origin("tiny"))
    assert refused.value.code == "dora"


def test_rows_of_a_rank_are_too_short_for_blocks(base: BaseModel, tmp_path: Path) -> None:
    with pytest.raises(NotExportable, match="take --outtype f32, f16, bf16"):
        plan_lora(tmp_path, base, "q8_0", Origin("tiny"))


def test_another_base_is_refused_by_its_shapes(base: BaseModel, tmp_path: Path) -> None:
    adapter = save_adapter(base.path, tmp_path / "adapter", r=4)
    wider = BaseModel.read(save_tokenizer(save_model(tmp_path / "wider", intermediate_size=128)))
    with pytest.raises(NotExportable, match=r"A is \(4, 96\) and B \(64, 4\), for a weight of \(64, 128\)"):
        plan_lora(adapter, wider, "f32", Origin("tiny"))


def test_the_adapter_moves_nothing_where_it_is_zero(base: BaseModel, tmp_path: Path) -> None:
    """save_adapter makes random ones, or the tests above would say nothing."""
    adapter = save_adapter(base.path, tmp_path / "adapter", r=4)
    values = load_file(adapter / "adapter_model.safetensors").values()
    assert all(float(torch.linalg.vector_norm(each)) > 0 for each in values)
