"""The base in NF4 on disk: the same bits as quantising in memory, whole or not at all, made once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from adapters import prequantized
from adapters.base import BaseModel
from adapters.prequantized import can_be_prequantized, is_there, main, place, prequantize
from tests.adapters.factories import base_tensors, tensor, write_base

torch = pytest.importorskip("torch")
pytest.importorskip("bitsandbytes")


@pytest.fixture(scope="module")
def made(demo_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return kept(BaseModel.read(demo_base), tmp_path_factory.mktemp("cache"))


def kept(base: BaseModel, cache_dir: Path) -> Path:
    destination = place(base, cache_dir)
    prequantize(base, destination)
    assert is_there(destination)
    return destination


def linear_weights(model: Any) -> dict[str, Any]:
    from bitsandbytes.functional import dequantize_4bit

    return {
        name: dequantize_4bit(parameter.data, parameter.quant_state)
        for name, parameter in model.named_parameters()
        if hasattr(parameter, "quant_state")
    }


@pytest.mark.filterwarnings("ignore")
def test_transformers_loads_it_with_the_weights_that_quantising_in_memory_gives(demo_base: Path, made: Path) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    in_memory = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    load = AutoModelForCausalLM.from_pretrained
    expected = linear_weights(load(demo_base, quantization_config=in_memory, dtype=torch.bfloat16))
    got = linear_weights(load(made, dtype=torch.bfloat16))

    assert got.keys() == expected.keys()
    assert len(got) == 7 * 30
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_it_is_smaller_and_brings_tokenizer_and_template(demo_base: Path, made: Path) -> None:
    size = {path: (path / "model.safetensors").stat().st_size for path in (demo_base, made)}
    assert size[made] < 0.45 * size[demo_base]
    small = {path.name for path in demo_base.iterdir()}
    assert {path.name for path in made.iterdir()} == small
    template = "chat_template.jinja"
    assert (made / template).read_bytes() == (demo_base / template).read_bytes()


def test_adapters_see_the_same_modules(demo_base: Path, made: Path) -> None:
    assert BaseModel.read(made).modules == BaseModel.read(demo_base).modules


def test_another_base_has_another_directory(tmp_path: Path) -> None:
    other = base_tensors() | {"extra.weight": tensor([[1.0, 2.0]], "F32")}
    bases = [write_base(tmp_path / "one"), write_base(tmp_path / "two", other)]

    assert len({place(BaseModel.read(base), tmp_path / "cache") for base in bases}) == 2


def test_a_base_in_shards(tmp_path: Path) -> None:
    whole = write_base(tmp_path / "tiny")
    sharded = tmp_path / "sharded"
    shutil.copytree(whole, sharded)
    (sharded / "model.safetensors").unlink()
    tensors = base_tensors()
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for number, part in enumerate((names[:2], names[2:])):
        path = write_base(tmp_path / f"part{number}", {name: tensors[name] for name in part})
        shutil.copyfile(path / "model.safetensors", sharded / f"shard{number}.safetensors")
        weight_map |= dict.fromkeys(part, f"shard{number}.safetensors")
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    made = kept(BaseModel.read(sharded), tmp_path / "cache")

    assert BaseModel.read(made).modules == BaseModel.read(whole).modules
    index = json.loads((made / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {"shard0.safetensors", "shard1.safetensors"}


def test_what_fails_half_way_leaves_nothing_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = write_base(tmp_path / "tiny")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prequantized, "_write_config", full)

    assert main([str(base), str(tmp_path / "cache" / "made"), str(tmp_path / "fingerprints")]) == 1

    assert list((tmp_path / "cache").iterdir()) == []
    assert "No space left" in capsys.readouterr().out


def test_what_is_quantised_or_has_fused_experts_stays_as_it_is(made: Path, tmp_path: Path) -> None:
    experts = base_tensors() | {"experts": tensor([[[1.0, 2.0]], [[3.0, 4.0]]], "F32")}

    assert can_be_prequantized(BaseModel.read(write_base(tmp_path / "tiny")))
    assert not can_be_prequantized(BaseModel.read(made))
    assert not can_be_prequantized(BaseModel.read(write_base(tmp_path / "experts", experts)))
