"""From files to a manifest or to a reason; the answers are known by hand."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapters.base import BaseModel
from adapters.errors import InvalidAdapter
from adapters.lora_weights import largest_magnitude
from adapters.refusals import REFUSALS
from adapters.safetensors_header import read_header
from adapters.store import digest_files
from adapters.validate import validate
from tests.adapters.factories import AdapterFiles, Tensor, lora_config, lora_tensors, safetensors, tensor

A, B = (f"base_model.model.model.layers.0.self_attn.q_proj.lora_{side}.weight" for side in "AB")
Spoil = Callable[[AdapterFiles], Any]


def check(path: Path, base: BaseModel, adapter: AdapterFiles) -> Any:
    return validate(adapter.write(path / "staged"), base, max_rank=16)


def test_manifest_holds_the_facts(tmp_path: Path, tiny_base: BaseModel) -> None:
    provenance = {
        "base_fingerprint": tiny_base.fingerprint,
        "lineage": {"seed": 7},
        "scores": {"loss": 1},
        "quantization": {"bits": 4},
        "chat_template_sha256": hashlib.sha256(b"{{ messages }}").hexdigest(),
    }
    adapter = AdapterFiles(extra={"loraplex.json": json.dumps(provenance).encode(), "README.md": b"# hello"})
    manifest = check(tmp_path, tiny_base, adapter)
    digest, files = digest_files(tmp_path / "staged")
    assert (manifest.digest, manifest.files) == (digest, files)
    assert set(files) == {"README.md", "adapter_config.json", "adapter_model.safetensors", "loraplex.json"}
    assert manifest.size_bytes == sum(len(content) for content in adapter.files().values())
    assert (manifest.kind, manifest.rank, manifest.alpha, manifest.dtype) == ("lora", 4, 8.0, "F32")
    assert (manifest.target_modules, manifest.module_count) == (("q_proj", "up_proj"), 4)
    assert manifest.parameter_count == 2 * (4 * 8 + 8 * 4) + 2 * (4 * 8 + 16 * 4)
    assert (manifest.base_model, manifest.base_fingerprint) == ("tiny", tiny_base.fingerprint)
    assert manifest.lineage["seed"] == 7
    assert manifest.lineage["quantization"] == {"bits": 4}
    assert manifest.scores == {"loss": 1.0}
    assert manifest.warnings == ()


def rank_eight_of_up_proj(adapter: AdapterFiles) -> None:
    adapter.config["rank_pattern"] = {"up_proj": 8}
    adapter.tensors |= {name: item for name, item in lora_tensors(rank=8).items() if "up_proj" in name}


@pytest.mark.parametrize(
    ("spoil", "rank", "dtype"),
    [
        (rank_eight_of_up_proj, 8, "F32"),
        (lambda adapter: adapter.tensors.update(lora_tensors(dtype="BF16")), 4, "BF16"),
        (lambda adapter: adapter.tensors.update(lora_tensors(dtype="F16")), 4, "F16"),
        (lambda adapter: adapter.tensors.update({A: tensor(np.zeros((4, 8)), "F16")}), 4, "mixed"),
    ],
)
def test_good_variants(tmp_path: Path, tiny_base: BaseModel, spoil: Spoil, rank: int, dtype: str) -> None:
    adapter = AdapterFiles()
    spoil(adapter)
    manifest = check(tmp_path, tiny_base, adapter)
    assert (manifest.rank, manifest.dtype) == (rank, dtype)


def test_names_without_peft_s_prefix_are_the_same_modules(tmp_path: Path, tiny_base: BaseModel) -> None:
    plain = {name.removeprefix("base_model.model."): item for name, item in lora_tensors().items()}
    assert check(tmp_path, tiny_base, AdapterFiles(tensors=plain)).module_count == 4


def put(name: str, item: Tensor | None) -> Spoil:
    def spoil(adapter: AdapterFiles) -> None:
        adapter.tensors.pop(name, None)
        if item is not None:
            adapter.tensors[name] = item

    return spoil


def with_value(value: float, dtype: str = "F32", at: str = A) -> Spoil:
    values = np.zeros((4, 8) if at == A else (8, 4), "f4")
    values[3, 2] = value
    return put(at, tensor(values, dtype))


def provenance(**content: Any) -> Spoil:
    return lambda adapter: adapter.extra.update({"loraplex.json": json.dumps(content).encode()})


def whole_weights(content: bytes) -> Spoil:
    return lambda adapter: adapter.extra.update({"adapter_model.safetensors": content})


def clear(adapter: AdapterFiles) -> None:
    adapter.tensors.clear()


SMALL = tensor([[1.0]])
BAD: list[tuple[str, Spoil, str]] = [
    ("nothing in it", clear, "no_modules"),
    ("empty file", whole_weights(b""), "bad_safetensors"),
    ("truncated", whole_weights(safetensors(lora_tensors())[:-1]), "bad_safetensors"),
    ("padded", whole_weights(safetensors(lora_tensors()) + b"\0"), "bad_safetensors"),
    ("huge header", whole_weights((1 << 40).to_bytes(8, "little") + b"{}"), "bad_safetensors"),
    ("B missing", put(B, None), "unpaired"),
    ("A missing", put(A, None), "unpaired"),
    ("narrower A", put(A, tensor(np.zeros((4, 7)))), "shape_mismatch"),
    ("wider A", put(A, tensor(np.zeros((4, 9)))), "shape_mismatch"),
    ("taller B", put(B, tensor(np.zeros((9, 4)))), "shape_mismatch"),
    ("A is a vector", put(A, tensor(np.zeros(32))), "shape_mismatch"),
    ("transposed", put(A, tensor(np.zeros((8, 4)))), "shape_mismatch"),
    ("rank of A", put(A, tensor(np.zeros((3, 8)))), "rank_mismatch"),
    ("rank of the configuration", lambda adapter: adapter.config.update(r=8), "rank_mismatch"),
    ("rank above the limit", lambda adapter: adapter.config.update(r=17), "rank_too_large"),
    (
        "layer beyond the base",
        put("base_model.model.model.layers.99.self_attn.q_proj.lora_A.weight", SMALL),
        "unknown_module",
    ),
    ("another module name", put("base_model.model.transformer.h.0.attn.c_attn.lora_A.weight", SMALL), "unknown_module"),
    ("output head", put("base_model.model.lm_head.lora_A.weight", SMALL), "unsupported_module"),
    ("embedding", put("base_model.model.model.embed_tokens.lora_embedding_A", SMALL), "unsupported_module"),
    ("whole embedding", put("base_model.model.model.embed_tokens.weight", SMALL), "unsupported_module"),
    ("head's base layer", put("base_model.model.lm_head.base_layer.weight", SMALL), "unsupported_module"),
    ("DoRA magnitudes", put(A.replace("lora_A.weight", "lora_magnitude_vector"), SMALL), "dora"),
    ("bias", put(B.replace("weight", "bias"), SMALL), "lora_bias"),
    ("AdaLoRA's E", put(A.replace("lora_A.weight", "lora_E"), SMALL), "unsupported_tensor"),
    ("adapter name inside", put(A.replace("lora_A.", "lora_A.default."), SMALL), "unsupported_tensor"),
    ("twice", put(A.removeprefix("base_model.model."), SMALL), "unsupported_tensor"),
    ("64-bit", put(A, tensor(np.zeros((4, 8)), "F64")), "unsupported_dtype"),
    ("bytes", put(A, tensor(np.zeros((4, 8)), "U8")), "unsupported_dtype"),
    ("NaN", with_value(float("nan")), "non_finite"),
    ("NaN in B", with_value(float("nan"), at=B), "non_finite"),
    ("infinity", with_value(float("inf")), "non_finite"),
    ("minus infinity in F16", with_value(float("-inf"), "F16"), "non_finite"),
    ("NaN in BF16", with_value(float("nan"), "BF16"), "non_finite"),
    ("too large for BF16", with_value(3.4e38), "non_finite"),
    ("too large once scaled", with_value(2.5e38, at=B), "non_finite"),
    ("another base", provenance(base_fingerprint="sha256:" + "0" * 64), "wrong_base"),
    ("fingerprint is a number", provenance(base_fingerprint=5), "bad_provenance"),
    ("lineage is a list", provenance(lineage=[1]), "bad_provenance"),
    ("score is a word", provenance(scores={"loss": "low"}), "bad_provenance"),
    ("provenance is not JSON", lambda adapter: adapter.extra.update({"loraplex.json": b"{"}), "bad_json"),
]


@pytest.mark.parametrize(("spoil", "code"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_bad_adapters(tmp_path: Path, tiny_base: BaseModel, spoil: Spoil, code: str) -> None:
    adapter = AdapterFiles()
    spoil(adapter)
    with pytest.raises(InvalidAdapter) as error:
        check(tmp_path, tiny_base, adapter)
    assert error.value.code == code
    assert error.value.message.endswith(REFUSALS[code])


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_missing_file_is_named(tmp_path: Path, tiny_base: BaseModel, name: str) -> None:
    staged = AdapterFiles().write(tmp_path / "staged")
    (staged / name).unlink()
    with pytest.raises(InvalidAdapter, match=f"no {name}") as error:
        validate(staged, tiny_base, max_rank=16)
    assert error.value.code == "missing_file"


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("position", [0, 1, 5, 6])
def test_largest_magnitude_is_found_across_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, position: int
) -> None:
    monkeypatch.setattr("adapters.lora_weights.CHUNK_ELEMENTS", 3)
    values = np.full(7, 0.5)
    values[position] = -2.0
    file = tmp_path / "f"
    file.write_bytes(safetensors({"before": SMALL, "x": tensor(values, dtype), "after": tensor([9.0])}))
    assert largest_magnitude(file, read_header(file)["x"]) == 2.0


@pytest.mark.parametrize(
    ("spoil", "warning"),
    [
        (lambda adapter: None, "no base fingerprint is recorded"),
        (provenance(chat_template_sha256="0" * 64), "another chat template"),
        (lambda adapter: adapter.config.update(target_modules=["q_proj"]), "2 modules carry weights but are not in"),
        (lambda adapter: adapter.config.update(shiny=1), "shiny"),
        (
            lambda adapter: adapter.tensors.update(
                {name: tensor(np.zeros(item.shape)) for name, item in adapter.tensors.items() if "lora_B" in name}
            ),
            "changes nothing",
        ),
    ],
)
def test_warnings(tmp_path: Path, tiny_base: BaseModel, spoil: Spoil, warning: str) -> None:
    adapter = AdapterFiles()
    spoil(adapter)
    assert any(warning in text for text in check(tmp_path, tiny_base, adapter).warnings)


def test_a_regular_expression_of_targets_is_not_tried(tmp_path: Path, tiny_base: BaseModel) -> None:
    adapter = AdapterFiles(config=lora_config(target_modules="(a+)+$"))
    assert not any("target_modules" in text for text in check(tmp_path, tiny_base, adapter).warnings)
