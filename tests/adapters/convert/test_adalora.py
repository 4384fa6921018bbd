"""AdaLoRA into LoRA: the same ΔW as PEFT's, through the whole gate, and no half-converted adapter."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from adapters.base import BaseModel
from adapters.convert import AS_IT_CAME, convert
from adapters.errors import InvalidAdapter
from tests.adapters.conftest import Shop
from tests.adapters.factories import MODULES, Tensor, loose, safetensors, tensor

SETTINGS = {
    "peft_type": "ADALORA",
    "init_r": 6,
    "target_r": 3,
    "lora_alpha": 5,
    "bias": "none",
    "task_type": "CAUSAL_LM",
}


def adalora(ranks: Mapping[str, int] | None = None, seed: int = 0, dtype: str = "F32") -> dict[str, Tensor]:
    """Tensors as PEFT saves them, on the tiny base; other ranks where given."""
    random = np.random.default_rng(seed)
    tensors = {}
    for module, (out_features, in_features) in MODULES.items():
        rank = (ranks or {}).get(module, 6)
        shapes = {"A": (rank, in_features), "B": (out_features, rank), "E": (rank, 1)}
        for part, shape in shapes.items():
            tensors[f"base_model.model.{module}.lora_{part}"] = tensor(random.normal(size=shape), dtype)
    return tensors


def files(tensors: Mapping[str, Tensor], **changes: Any) -> dict[str, bytes]:
    config = {**SETTINGS, "target_modules": ["q_proj"], "base_model_name_or_path": "tiny", **changes}
    return {"adapter_config.json": json.dumps(config).encode(), "adapter_model.safetensors": safetensors(tensors)}


def base_of(modules: Mapping[str, tuple[int, int]]) -> BaseModel:
    return BaseModel(Path("tiny"), "tiny", "sha256:0", modules)


def staged(path: Path, content: Mapping[str, bytes]) -> Path:
    path.mkdir()
    for name, data in content.items():
        (path / name).write_bytes(data)
    return path


def deltas(directory: Path) -> dict[str, Any]:
    """Module → B·A of a plain LoRA, scaling included."""
    config = json.loads((directory / "adapter_config.json").read_text())
    assert (config["peft_type"], config["lora_alpha"]) == ("LORA", config["r"])
    tensors = load_file(directory / "adapter_model.safetensors")
    names = {name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")}
    return {
        name.removeprefix("base_model.model."): tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
        for name in names
    }


@pytest.mark.parametrize("pruned", [True, False])
def test_the_change_of_every_weight_is_the_one_that_peft_computes(tmp_path: Path, pruned: bool) -> None:
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    torch.manual_seed(0)
    layers = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(4)))
    budget = {"tinit": 1, "tfinal": 1, "deltaT": 1, "total_step": 6}
    config = peft.AdaLoraConfig(init_r=6, target_r=3, lora_alpha=5, target_modules=["0", "1", "2", "3"], **budget)
    model = peft.get_peft_model(layers, config)
    for name, parameter in model.named_parameters():
        if "lora_E" in name:
            torch.nn.init.normal_(parameter)
    for step in range(1, 7 if pruned else 1):
        model.zero_grad()
        model(torch.randn(5, 8)).square().sum().backward()
        model.base_model.update_and_allocate(step)
    model.save_pretrained(tmp_path / "saved")
    kept = [module for module in model.modules() if isinstance(module, peft.tuners.adalora.layer.SVDLinear)]
    exact = {str(number): module.get_delta_weight("default").detach().numpy() for number, module in enumerate(kept)}

    done = convert(tmp_path / "saved", base_of(dict.fromkeys("0123", (8, 8))), 16)

    assert (done.conversion["from"], done.conversion["exact"]) == ("adalora", True)
    assert (done.conversion["ranks"]["sum"] < 4 * 6) == pruned
    got = deltas(tmp_path / "saved")
    for name, delta in exact.items():
        np.testing.assert_allclose(got.get(name, np.zeros_like(delta)), delta, atol=1e-6, rtol=1e-5)


def test_it_goes_through_the_gate_and_says_so(shop: Shop) -> None:
    first, *others = MODULES
    content = files(adalora({first: 2, others[0]: 0}))
    version, created = shop.ingest.upload("a", loose(content))
    assert (created, version.manifest.kind, version.manifest.rank) == (True, "lora", 6)
    assert version.manifest.verdict == "converted exactly from adalora"
    assert version.manifest.conversion["modules_without_rank"] == 1
    assert set(version.manifest.conversion["source_sha256"]) == set(content)
    assert version.manifest.module_count == len(MODULES) - 1
    assert shop.ingest.upload("a", loose(content)) == (version, False)
    plain = json.loads((shop.store.path(version.digest) / "adapter_config.json").read_text())
    assert "init_r" not in plain


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_any_precision(tmp_path: Path, dtype: str) -> None:
    directory = staged(tmp_path / "a", files(adalora(dtype=dtype)))
    convert(directory, base_of(MODULES), 16)
    exact = staged(tmp_path / "b", files(adalora()))
    convert(exact, base_of(MODULES), 16)
    for name, delta in deltas(exact).items():
        np.testing.assert_allclose(deltas(directory)[name], delta, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("peft_type", ["XLORA", "PREFIX_TUNING", None, 7])
def test_kinds_that_are_not_known_are_left_alone(tmp_path: Path, peft_type: Any) -> None:
    content = files(adalora(), peft_type=peft_type)
    directory = staged(tmp_path / "a", content)
    assert convert(directory, base_of(MODULES), 16) is AS_IT_CAME
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == content


FIRST = next(iter(MODULES))


def without(part: str) -> dict[str, Tensor]:
    return {name: each for name, each in adalora().items() if name != f"base_model.model.{FIRST}.lora_{part}"}


def changed(part: str, values: Any, dtype: str = "F32") -> dict[str, Tensor]:
    return {**adalora(), f"base_model.model.{FIRST}.lora_{part}": tensor(values, dtype)}


@pytest.mark.parametrize(
    ("tensors", "changes", "code"),
    [
        (without("E"), {}, "unpaired"),
        (changed("E", np.ones((5, 1))), {}, "rank_mismatch"),
        (changed("E", np.ones((6, 2))), {}, "rank_mismatch"),
        (changed("E", np.ones(6)), {}, "rank_mismatch"),
        (changed("E", np.full((6, 1), np.nan)), {}, "non_finite"),
        (changed("A", np.ones((6, 3))), {}, "shape_mismatch"),
        (changed("E", np.ones((6, 1)), "F64"), {}, "unsupported_dtype"),
        ({**adalora(), "base_model.model.x.lora_A.weight": tensor([[1.0]])}, {}, "unsupported_tensor"),
        (adalora(dict.fromkeys(MODULES, 0)), {}, "no_modules"),
        ({name.replace("layers.1", "layers.9"): each for name, each in adalora().items()}, {}, "unknown_module"),
        (adalora(), {"init_r": 0}, "bad_config"),
        (adalora(), {"init_r": None}, "bad_config"),
        (adalora(), {"init_r": True}, "bad_config"),
        (adalora(), {"lora_alpha": 0}, "bad_scaling"),
        (adalora(), {"lora_alpha": 1e300}, "bad_scaling"),
        (adalora(), {"modules_to_save": ["lm_head"]}, "modules_to_save"),
        (adalora(), {"bias": "all"}, "lora_bias"),
    ],
)
def test_what_cannot_be_converted_says_why_and_leaves_nothing(
    shop: Shop, tensors: dict[str, Tensor], changes: dict[str, Any], code: str
) -> None:
    before = shop.contents()
    with pytest.raises(InvalidAdapter) as error:
        shop.ingest.upload("a", loose(files(tensors, **changes)))
    assert error.value.code == code
    assert shop.registry.adapters() == []
    assert shop.contents() == before
