"""The base's identity and its modules, from plain, sharded and pre-quantised checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from adapters.base import BaseModel
from adapters.errors import AdapterError
from tests.adapters.factories import MODULES, Tensor, base_tensors, safetensors, tensor, write_base


def shard(path: Path) -> None:
    """Split model.safetensors in two, as save_pretrained does for large models."""
    names = list(base_tensors())
    parts = {"model-1.safetensors": names[:3], "model-2.safetensors": names[3:]}
    for file, held in parts.items():
        (path / file).write_bytes(safetensors({name: base_tensors()[name] for name in held}))
    weight_map = {name: file for file, held in parts.items() for name in held}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (path / "model.safetensors").unlink()


def test_modules_are_the_linear_ones_only(tmp_path: Path) -> None:
    base = BaseModel.read(write_base(tmp_path / "tiny"))
    assert base.modules == MODULES
    assert base.name == "tiny"
    assert base.fingerprint.startswith("sha256:")


def test_served_name_replaces_the_directory_s(tmp_path: Path) -> None:
    assert BaseModel.read(write_base(tmp_path / "tiny"), name="llama").name == "llama"


def test_shards_and_directory_do_not_change_the_fingerprint(tmp_path: Path) -> None:
    one, two = write_base(tmp_path / "one"), write_base(tmp_path / "two")
    shard(two)
    sharded = BaseModel.read(two)
    assert sharded.modules == MODULES
    assert sharded.fingerprint == BaseModel.read(one).fingerprint


def test_saving_details_do_not_change_the_fingerprint(tmp_path: Path) -> None:
    plain = BaseModel.read(write_base(tmp_path / "a"))
    saved_again = BaseModel.read(write_base(tmp_path / "b", transformers_version="9", torch_dtype="bfloat16"))
    assert saved_again.fingerprint == plain.fingerprint


def test_weights_names_and_architecture_change_the_fingerprint(tmp_path: Path) -> None:
    renamed = base_tensors()
    renamed["model.layers.9.mlp.up_proj.weight"] = renamed.pop("model.layers.1.mlp.up_proj.weight")
    paths = [
        write_base(tmp_path / "a"),
        write_base(tmp_path / "b", base_tensors(seed=1)),
        write_base(tmp_path / "c", rope_theta=5),
        write_base(tmp_path / "d", renamed),
    ]
    assert len({BaseModel.read(path).fingerprint for path in paths}) == 4


def test_prequantised_weights_have_the_shape_in_their_quant_state(tmp_path: Path) -> None:
    state = json.dumps({"quant_type": "nf4", "blocksize": 64, "shape": [16, 8]}).encode()
    packed = {
        "model.layers.0.mlp.up_proj.weight": tensor(np.zeros((64, 1)), "U8"),
        "model.layers.0.mlp.up_proj.weight.absmax": tensor(np.zeros(2)),
        "model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4": Tensor("U8", (len(state),), state),
        "model.embed_tokens.weight": tensor(np.zeros((4, 8))),
    }
    assert BaseModel.read(write_base(tmp_path / "q", packed)).modules == {"model.layers.0.mlp.up_proj": (16, 8)}


def test_cached_fingerprint_is_read_once_and_follows_the_files(tmp_path: Path) -> None:
    path, cache = write_base(tmp_path / "tiny"), tmp_path / "cache"
    first = BaseModel.read(path, cache_dir=cache).fingerprint
    [entry] = cache.iterdir()
    entry.write_text(entry.read_text().replace(first, "sha256:from-the-cache"))
    assert BaseModel.read(path, cache_dir=cache).fingerprint == "sha256:from-the-cache"
    (path / "model.safetensors").write_bytes(safetensors(base_tensors(seed=1)))
    assert BaseModel.read(path, cache_dir=cache).fingerprint == BaseModel.read(path).fingerprint != first


def test_damaged_cache_is_ignored(tmp_path: Path) -> None:
    path, cache = write_base(tmp_path / "tiny"), tmp_path / "cache"
    first = BaseModel.read(path, cache_dir=cache).fingerprint
    [entry] = cache.iterdir()
    entry.write_text("{")
    assert BaseModel.read(path, cache_dir=cache).fingerprint == first


@pytest.mark.parametrize("spoiled", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("content", [None, b"", b"[]"])
def test_broken_directory_says_what_is_expected(tmp_path: Path, spoiled: str, content: bytes | None) -> None:
    path = write_base(tmp_path / "tiny")
    (path / spoiled).unlink() if content is None else (path / spoiled).write_bytes(content)
    with pytest.raises(AdapterError, match=r"cannot be the base model: .*Expected a Hugging Face directory") as error:
        BaseModel.read(path)
    assert error.value.code == "bad_base"


@pytest.mark.parametrize("weight_map", [{"x": "../model.safetensors"}, {"x": "gone.safetensors"}, {}, None])
def test_bad_index_is_refused(tmp_path: Path, weight_map: object) -> None:
    path = write_base(tmp_path / "tiny")
    shutil.copy(path / "model.safetensors", tmp_path)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(AdapterError, match="cannot be the base model"):
        BaseModel.read(path)
