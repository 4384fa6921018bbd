"""A GGUF file against what is known by hand; llama.cpp has a file of its own."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.torch import load_file, save_file

from adapters.base import BaseModel
from adapters.errors import NotExportable
from adapters.merge.export.gguf_decoder import read_decoder
from adapters.merge.export.gguf_file import GgufTensor, OutType, type_for, write_gguf
from adapters.merge.export.gguf_model import plan_gguf, write_model
from adapters.merge.export.origin import Origin
from tests.adapters.merge.export.tiny import VOCABULARY, save_model, save_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(save_model(tmp_path_factory.mktemp("llama")))


def exported(model: Path, path: Path, outtype: OutType = "f32") -> GGUFReader:
    write_model(plan_gguf(BaseModel.read(model), outtype, Origin("tiny")), path)
    return GGUFReader(path)


def changed(model: Path, copy: Path, **config: Any) -> Path:
    copy.mkdir()
    for path in model.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    found = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(found | config))
    return copy


def test_rows_of_q_are_in_pairs_and_all_else_as_it_was(model: Path, tmp_path: Path) -> None:
    """Head 0 has the rows 0 to 15: transformers turns 0 with 8, llama.cpp the first row with the second."""
    tensors = {tensor.name: tensor for tensor in exported(model, tmp_path / "a.gguf").tensors}
    source = {name: value.numpy() for name, value in load_file(model / "model.safetensors").items()}
    q = source["model.layers.0.self_attn.q_proj.weight"]
    assert np.array_equal(tensors["blk.0.attn_q.weight"].data[:4], q[[0, 8, 1, 9]])
    assert np.array_equal(tensors["blk.0.attn_q.weight"].data[16:18], q[[16, 24]])
    for theirs, ours in {
        "blk.1.attn_v.weight": "model.layers.1.self_attn.v_proj.weight",
        "blk.1.ffn_down.weight": "model.layers.1.mlp.down_proj.weight",
        "blk.0.ffn_norm.weight": "model.layers.0.post_attention_layernorm.weight",
        "token_embd.weight": "model.embed_tokens.weight",
        "output.weight": "lm_head.weight",
        "output_norm.weight": "model.norm.weight",
    }.items():
        assert np.array_equal(tensors[theirs].data, source[ours]), theirs
    assert len(tensors) == len(source)


@pytest.mark.parametrize(("outtype", "error"), [("f32", 0.0), ("f16", 2**-11), ("bf16", 2**-8), ("q8_0", 2**-7)])
def test_each_type_gives_the_values_back_as_near_as_it_can(
    model: Path, tmp_path: Path, outtype: OutType, error: float
) -> None:
    (tensor,) = (
        each for each in exported(model, tmp_path / "a", outtype).tensors if each.name == "blk.0.ffn_up.weight"
    )
    source = load_file(model / "model.safetensors")["model.layers.0.mlp.up_proj.weight"].numpy()
    found = dequantize(tensor.data, tensor.tensor_type)
    assert tensor.tensor_type.name == outtype.upper()
    assert 0 <= np.abs(found - source).max() <= error * np.abs(source).max()
    assert (np.abs(found - source).max() == 0) == (outtype == "f32")


def test_vectors_stay_exact_and_rows_that_are_no_blocks_stay_f16() -> None:
    assert type_for((64,), "q8_0") == "F32"
    assert type_for((8, 48), "q8_0") == "F16"
    assert type_for((8, 64), "q8_0") == "Q8_0"


def test_rows_without_a_token_get_a_name_and_are_never_used(model: Path, tmp_path: Path) -> None:
    fields = exported(model, tmp_path / "a.gguf").fields
    tokens, types = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type"))
    last = {"<unk>": 3, "a": 1, "<tool>": 4, f"[PAD{VOCABULARY - 1}]": 5}
    assert {token: types[tokens.index(token)] for token in last} == last
    assert len(tokens) == len(types) == VOCABULARY


def test_every_end_of_an_answer_that_transformers_knows_ends_it(model: Path, tmp_path: Path) -> None:
    copy = changed(model, tmp_path / "copy")
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 4, 3, 0]}))
    plan = plan_gguf(BaseModel.read(copy), "f16", Origin("tiny"))
    assert plan.vocabulary.special == {"bos": 1, "eos": 4, "pad": 0, "eot": 2, "eom": 3}
    assert plan.notes == ("GGUF has no place for so many ends of an answer: [0] are left out",)


@pytest.mark.parametrize(
    ("config", "code", "says"),
    [
        ({"model_type": "gpt2"}, "unknown_architecture", "known are llama, mistral, qwen2, qwen3"),
        ({"hidden_act": "gelu"}, "not_exportable", "gelu"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "unknown_rope", "dynamic"),
        ({"num_hidden_layers": 3}, "unexpected_tensors", "has no"),
        ({"num_hidden_layers": 1}, "unexpected_tensors", "which a llama of 1 layers has not"),
        ({"num_key_value_heads": 4}, "unexpected_tensors", r"k_proj.weight is \(32, 64\), by config.json .*\(64, 64\)"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    model: Path, tmp_path: Path, config: dict[str, Any], code: str, says: str
) -> None:
    copy = changed(model, tmp_path / "copy", **config)
    with pytest.raises(NotExportable, match=says) as refused:
        plan_gguf(BaseModel.read(copy), "f16", Origin("tiny"))
    assert refused.value.code == code


def test_a_mistral_with_a_window_ends_at_the_window(tmp_path: Path) -> None:
    decoder = read_decoder(save_model(tmp_path, "mistral", sliding_window=128))
    assert decoder.context == 128
    assert decoder.notes == ("llama.cpp knows no sliding window here: the context ends at the window, 128 of 256",)


def test_a_packed_model_is_refused(model: Path, tmp_path: Path) -> None:
    copy = changed(model, tmp_path / "copy")
    tensors = load_file(copy / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name].char()}, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(NotExportable, match="give a model in 16 or 32 bits"):
        plan_gguf(BaseModel.read(copy), "f16", Origin("tiny"))


def test_a_value_that_f16_cannot_hold_is_an_error_and_not_infinite(tmp_path: Path) -> None:
    large = np.full((2, 32), 70_000, np.float32)
    with pytest.raises(NotExportable, match="70000, which F16 cannot hold; take --outtype bf16 or f32"):
        write_gguf(tmp_path / "a", "llama", lambda _: None, [GgufTensor("a", large.shape, "F16", lambda: large)])
    write_gguf(tmp_path / "b", "llama", lambda _: None, [GgufTensor("a", large.shape, "BF16", lambda: large)])


def test_a_tokenizer_that_cuts_in_another_way_is_refused(tmp_path: Path) -> None:
    from tokenizers import pre_tokenizers

    cut = pre_tokenizers.Sequence(
        [pre_tokenizers.Punctuation("isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    model = save_tokenizer(save_model(tmp_path), cut)
    with pytest.raises(NotExportable, match=r"Punctuation.*Known are gpt-2, llama-bpe, qwen2") as refused:
        plan_gguf(BaseModel.read(model), "f16", Origin("tiny"))
    assert refused.value.code == "unknown_tokenizer"


def test_a_model_without_a_tokenizer_is_refused(model: Path, tmp_path: Path) -> None:
    copy = changed(model, tmp_path / "copy")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copy / name).unlink()
    with pytest.raises(NotExportable, match="no tokenizer that transformers can load"):
        plan_gguf(BaseModel.read(copy), "f16", Origin("tiny"))


def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path) -> None:
    given: list[weakref.ref[Any]] = []

    def values() -> Any:
        assert all(each() is None for each in given)
        array = np.zeros((4, 32), np.float32)
        given.append(weakref.ref(array))
        return array

    tensors = [GgufTensor(name, (4, 32), "F16", values) for name in "abc"]
    done: list[tuple[str, int]] = []
    write_gguf(tmp_path / "a", "llama", lambda _: None, tensors, lambda name, size: done.append((name, size)))
    assert done == [("a", 256), ("b", 256), ("c", 256)]
