"""Every kind that PEFT makes: the LoRA it becomes changes each weight as PEFT changes it, or the verdict says by how
much not, or why only a merge will do.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from adapters.base import BaseModel
from adapters.convert import convert
from adapters.errors import InvalidAdapter
from adapters.tensor_values import Matrix
from tests.adapters.convert.peft_made import move, save
from tests.adapters.convert.test_adalora import deltas

peft = pytest.importorskip("peft")
TARGETS = ["q_proj", "up_proj"]


def lora(**options: Any) -> Any:
    return peft.LoraConfig(**{"r": 2, "lora_alpha": 3, "target_modules": TARGETS, **options})


def without_projections() -> Any:
    config = peft.VeraConfig(r=4, target_modules=TARGETS, save_projection=True)
    config.save_projection = False  # the constructor would warn
    return config


EXACT: dict[str, Any] = {
    "over rank, but not in fact": lora(r=32),
    "dora with its own norms": lora(use_dora=True),
    "pissa": lora(init_lora_weights="pissa"),
    "pissa with rsLoRA": lora(init_lora_weights="pissa", use_rslora=True),
    "olora": lora(init_lora_weights="olora"),
    "bias option without biases": lora(bias="lora_only"),
    "modules_to_save, untouched": lora(modules_to_save=["norm"]),
    "loha": peft.LoHaConfig(r=2, alpha=3, target_modules=TARGETS),
    "loha, other ranks and alphas": peft.LoHaConfig(
        r=2, alpha=3, target_modules=TARGETS, rank_pattern={"q_proj": 1}, alpha_pattern={"up_proj": 5}
    ),
    "lokr": peft.LoKrConfig(r=2, alpha=3, target_modules=TARGETS),
    "lokr, both decomposed": peft.LoKrConfig(r=1, alpha=3, target_modules=TARGETS, decompose_both=True),
    "vera": peft.VeraConfig(r=8, target_modules=["q_proj"], save_projection=True),
    "vera over two shapes": peft.VeraConfig(r=4, target_modules=TARGETS, save_projection=True),
}


def only(*parts: str) -> Any:
    """Moves the parameters whose names have one of these parts."""

    def train(model: Any) -> None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad = any(part in name for part in parts)
        move(model)

    return train


@pytest.mark.parametrize("case", EXACT)
def test_it_becomes_a_lora_exactly(tiny_base: BaseModel, tmp_path: Path, case: str) -> None:
    train = only("lora_A") if case.startswith("dora") else only("lora_") if "untouched" in case else None
    expected = save(tiny_base, EXACT[case], tmp_path / "a", train=train)
    if case.startswith("dora"):
        assert_magnitudes_matter_not(expected)
    verdict = convert(tmp_path / "a", tiny_base, 16)
    assert verdict.merge_only is None
    assert (verdict.conversion["exact"], verdict.conversion["error"]) == (True, 0)
    assert_changes(tmp_path / "a", expected)
    assert not list((tmp_path / "a").glob("original_*"))


def assert_magnitudes_matter_not(expected: Mapping[str, Matrix]) -> None:
    """B stays zero there, and so does ΔW."""
    assert max(np.abs(delta).max() for delta in expected.values()) < 1e-6


def assert_changes(directory: Path, expected: Mapping[str, Matrix], tolerance: float = 1e-5) -> None:
    got = deltas(directory)
    assert set(got) <= set(expected)
    for module, delta in expected.items():
        found = got.get(module, np.zeros_like(delta))
        assert float(np.linalg.norm(found - delta)) <= tolerance * max(float(np.linalg.norm(delta)), 1), module


INEXACT: dict[str, Any] = {
    "lora": lora(r=4),
    "dora": lora(use_dora=True),
    "loha": peft.LoHaConfig(r=2, alpha=3, target_modules=TARGETS),
    "lokr": peft.LoKrConfig(r=2, alpha=3, target_modules=TARGETS),
    "vera": peft.VeraConfig(r=8, target_modules=TARGETS, save_projection=True),
    "pissa": lora(init_lora_weights="pissa"),
}
REFUSED_UNLESS_ACCEPTED = ("lora", "pissa")


@pytest.mark.parametrize("case", INEXACT)
def test_an_error_is_stated_and_taken_only_where_it_is_accepted(
    tiny_base: BaseModel, tmp_path: Path, case: str
) -> None:
    expected = save(tiny_base, INEXACT[case], tmp_path / "a")
    for name in ("b", "c"):
        shutil.copytree(tmp_path / "a", tmp_path / name)
    before = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    if case in REFUSED_UNLESS_ACCEPTED:
        with pytest.raises(InvalidAdapter, match="upload it with max_error=") as refused:
            convert(tmp_path / "a", tiny_base, 2)
        assert refused.value.code == "rank_too_large"
        error = 1.0
    else:
        verdict = convert(tmp_path / "a", tiny_base, 2)
        assert verdict.merge_only is not None
        assert verdict.kind == case
        assert f"max_error={np.ceil(verdict.conversion['error'] * 1000) / 1000:g}" in verdict.merge_only
        error = verdict.conversion["error"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()} == before

    taken = convert(tmp_path / "b", tiny_base, 2, max_error=error + 1e-6)
    assert taken.merge_only is None
    assert taken.conversion["exact"] is False
    got = deltas(tmp_path / "b")
    off = np.sqrt(sum(np.linalg.norm(got[module] - delta) ** 2 for module, delta in expected.items()))
    size = np.sqrt(sum(np.linalg.norm(delta) ** 2 for delta in expected.values()))
    assert taken.conversion["error"] == pytest.approx(float(off / size), rel=1e-3)
    assert taken.conversion["largest_error"] >= taken.conversion["error"] > 0.01
    kept = {name.removeprefix("original_"): (tmp_path / "b" / name).read_bytes() for name in ORIGINALS}
    assert kept == {name: before[name] for name in kept}

    with pytest.raises(InvalidAdapter) if case in REFUSED_UNLESS_ACCEPTED else nothing():
        assert convert(tmp_path / "c", tiny_base, 2, max_error=taken.conversion["error"] * 0.9).merge_only


ORIGINALS = ("original_adapter_config.json", "original_adapter_model.safetensors")


class nothing:  # noqa: N801 - stands where pytest.raises stands
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


@pytest.mark.parametrize(
    ("config", "train", "reason"),
    [
        (lora(lora_bias=True), None, "trained bias"),
        (lora(modules_to_save=["norm"]), None, "as a whole, such as model.norm.weight"),
        (peft.IA3Config(target_modules=TARGETS, feedforward_modules=[]), None, "scales rows or columns"),
        (peft.OFTConfig(r=0, oft_block_size=4, target_modules=TARGETS), None, "rotates"),
        (peft.BOFTConfig(boft_block_size=4, target_modules=TARGETS), None, "rotates"),
        (peft.HRAConfig(r=2, target_modules=TARGETS), None, "reflects"),
        (without_projections(), None, "random matrices are not in"),
    ],
    ids=lambda value: getattr(value, "peft_type", None),
)
def test_what_is_no_lora_is_kept_for_a_merge(
    tiny_base: BaseModel, tmp_path: Path, config: Any, train: Any, reason: str
) -> None:
    save(tiny_base, config, tmp_path / "a", train=train)
    before = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    verdict = convert(tmp_path / "a", tiny_base, 16, max_error=1)
    assert verdict.merge_only is not None
    assert reason in verdict.merge_only
    assert {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()} == before


def test_a_trained_bias_that_is_zero_is_left_out(tiny_base: BaseModel, tmp_path: Path) -> None:
    expected = save(tiny_base, lora(lora_bias=True), tmp_path / "a", train=only("lora_A", "lora_B.default.weight"))
    assert convert(tmp_path / "a", tiny_base, 16).conversion["exact"]
    assert_changes(tmp_path / "a", expected)
    assert all("bias" not in name for name in load_file(tmp_path / "a/adapter_model.safetensors"))


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_what_it_began_with_may_be_sent_along(tiny_base: BaseModel, tmp_path: Path, init: str) -> None:
    def save_first(model: Any) -> None:
        model.save_pretrained(tmp_path / "first")
        move(model)

    expected = save(tiny_base, lora(init_lora_weights=init), tmp_path / "a", train=save_first)
    if "niter" in init:
        with pytest.raises(InvalidAdapter, match=r"no initial_adapter_model\.safetensors") as refused:
            convert(tmp_path / "a", tiny_base, 16)
        assert refused.value.code == "modified_base"
    shutil.copy(tmp_path / "first/adapter_model.safetensors", tmp_path / "a/initial_adapter_model.safetensors")
    verdict = convert(tmp_path / "a", tiny_base, 16)
    assert (verdict.conversion["from"], verdict.conversion["exact"]) == (init.partition("_")[0], True)
    assert_changes(tmp_path / "a", expected)
    assert not (tmp_path / "a/initial_adapter_model.safetensors").exists()


def test_one_that_does_not_fit_the_other_is_refused(tiny_base: BaseModel, tmp_path: Path) -> None:
    save(tiny_base, lora(init_lora_weights="pissa_niter_4"), tmp_path / "a")
    save(tiny_base, lora(r=3), tmp_path / "b")
    shutil.copy(tmp_path / "b/adapter_model.safetensors", tmp_path / "a/initial_adapter_model.safetensors")
    with pytest.raises(InvalidAdapter) as refused:
        convert(tmp_path / "a", tiny_base, 16)
    assert refused.value.code == "rank_mismatch"


def spoiled(directory: Path, change: Any) -> None:
    tensors = load_file(directory / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})


def first(tensors: Mapping[str, Any], part: str) -> str:
    return next(name for name in tensors if part in name)


def test_damage_is_refused_by_its_name(tiny_base: BaseModel, tmp_path: Path) -> None:
    cases: list[tuple[str, Any, str, str]] = [
        ("loha", EXACT["loha"], "hada_w1_a", "unpaired"),
        ("lokr", EXACT["lokr"], "lokr_w1", "unpaired"),
        ("dora", INEXACT["dora"], "lora_magnitude_vector", "dora"),
        ("vera", EXACT["vera"], "vera_lambda_b", "unpaired"),
    ]
    for kind, config, part, code in cases:
        for damage, expected in (
            ("drop", code),
            ("nan", "non_finite"),
            ("shape", "shape_mismatch"),
            ("far", "unknown"),
        ):
            directory = tmp_path / f"{kind}-{damage}"
            save(tiny_base, config, directory)

            def harm(tensors: dict[str, Any], damage: str = damage, part: str = part) -> None:
                name = first(tensors, part)
                values = tensors.pop(name)
                if damage == "nan":
                    tensors[name] = np.full_like(values, np.nan)
                elif damage == "shape":
                    tensors[name] = np.ones(tuple(size + 1 for size in values.shape), np.float32)
                elif damage == "far":
                    tensors[name.replace("layers.0", "layers.7")] = values

            spoiled(directory, harm)
            with pytest.raises(InvalidAdapter) as refused:
                convert(directory, tiny_base, 16, max_error=1)
            assert refused.value.code == ("unknown_module" if expected == "unknown" else expected), (kind, damage)


def test_copies_of_the_base_alone_are_no_adapter(tiny_base: BaseModel, tmp_path: Path) -> None:
    save(tiny_base, lora(modules_to_save=["norm"]), tmp_path / "a", train=only("lora_"))
    spoiled(tmp_path / "a", lambda tensors: [tensors.pop(name) for name in list(tensors) if "lora_" in name])
    with pytest.raises(InvalidAdapter, match="unchanged") as refused:
        convert(tmp_path / "a", tiny_base, 16)
    assert refused.value.code == "no_modules"


def test_dora_and_a_changed_base_at_once_are_refused(tiny_base: BaseModel, tmp_path: Path) -> None:
    save(tiny_base, lora(use_dora=True), tmp_path / "a")
    config = json.loads((tmp_path / "a/adapter_config.json").read_text()) | {"init_lora_weights": "pissa"}
    (tmp_path / "a/adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidAdapter) as refused:
        convert(tmp_path / "a", tiny_base, 16)
    assert refused.value.code == "unsupported_variant"


def test_the_same_bytes_become_the_same_files(tiny_base: BaseModel, tmp_path: Path) -> None:
    save(tiny_base, INEXACT["dora"], tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for name in ("a", "b"):
        convert(tmp_path / name, tiny_base, 2, max_error=1)
    assert {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()
    }
