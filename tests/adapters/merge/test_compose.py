from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from adapters.base import BaseModel
from adapters.errors import AdapterError, Conflict, InvalidAdapter, MergeError, NotMergeable
from adapters.ingest import Ingest
from adapters.lineage import parents
from adapters.merge.combine import METHODS, SPARSE, Method, Part, Recipe, combine, seed_of
from adapters.merge.compose import compose
from adapters.merge.files import digest_of_adapter
from adapters.tensor_values import Matrix
from tests.adapters.convert.peft_made import model_of, move
from tests.adapters.factories import HIDDEN
from tests.adapters.merge.by_hand import Q, base_of_ones, rank_one, written

peft = pytest.importorskip("peft")


def delta(directory: Path, module: str = Q) -> Matrix:
    tensors = load_file(directory / "adapter_model.safetensors")
    config = json.loads((directory / "adapter_config.json").read_text())
    b, a = (tensors[f"base_model.model.{module}.lora_{side}.weight"] for side in "BA")
    return np.asarray(b @ a * (config["lora_alpha"] / config["r"]), np.float32)


def matrix(rows: Any) -> Part:
    return Part(1.0, np.array(rows, np.float32))


def product(*parts: Part, **recipe: Any) -> Matrix:
    weights = recipe.pop("weights", tuple(part.weight for part in parts))
    factors = combine("m", parts, Recipe(weights=weights, **recipe)).fitted.factors
    return np.asarray(factors.b @ factors.a)


def test_the_sum_is_known_by_hand() -> None:
    one, two = matrix([[2, 0], [0, 0]]), Part(-0.5, np.array([[2, 0], [0, 4]], np.float32))
    for method in ("svd", "cat"):
        assert product(one, two, method=method) == pytest.approx(np.array([[1, 0], [0, -2]]))


def test_ties_is_known_by_hand() -> None:
    """Half of the values go, the smaller ones: 4 3 · · and · -5 2 · are left. Their signs are + - +; 3 disagrees."""
    one, two = matrix([[4, 3], [1, 0.5]]), matrix([[1, -5], [2, 0.5]])
    found = product(one, two, method="ties_svd", density=0.5)
    assert found == pytest.approx(np.array([[4, -5], [2, 0]]), abs=1e-5)


def test_pruning_is_known_by_hand() -> None:
    one, two = matrix([[4, 3], [1, 0.5]]), matrix([[1, -5], [2, 0.5]])
    found = product(one, two, method="magnitude_prune_svd", density=0.5)
    assert found == pytest.approx(np.array([[4, -2], [2, 0]]), abs=1e-5)


def test_dare_keeps_its_share_and_scales_it_up_the_same_for_the_same_seed() -> None:
    ones = Part(1.0, np.ones((64, 64), np.float32))
    found = product(ones, method="dare_linear_svd", density=0.25, seed=1)
    assert set(np.round(found, 3).ravel()) == {0.0, 4.0}
    assert 0.2 < (found > 2).mean() < 0.3
    assert (product(ones, method="dare_linear_svd", density=0.25, seed=1) == found).all()
    assert (product(ones, method="dare_linear_svd", density=0.25, seed=2) != found).any()


def test_what_the_rank_leaves_out_is_stated() -> None:
    found = combine("m", [matrix([[3, 0], [0, 4]])], Recipe("svd", (1.0,), rank=1))
    figures = [found.fitted.off, found.fitted.size, found.far, found.sum_size]
    assert figures == pytest.approx([3, 5, 3, 5])


@pytest.fixture
def two(tiny_base: BaseModel, tmp_path: Path) -> tuple[Any, list[Path]]:
    """A PEFT model with two adapters of other scalings on one module, and their directories."""
    configs = [peft.LoraConfig(r=2, lora_alpha=alpha, target_modules=[Q]) for alpha in (3, 6)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = peft.get_peft_model(model_of(tiny_base), configs[0], adapter_name="one")
        model.add_adapter("two", configs[1])
        for name in ("one", "two"):
            model.set_adapter(name)
            move(model)
        model.save_pretrained(tmp_path)
    return model, [tmp_path / "one", tmp_path / "two"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("weights", [(0.7, 0.3), (1.0, -0.5)], ids=str)
def test_it_is_what_peft_makes_of_them(
    two: tuple[Any, list[Path]],
    tiny_base: BaseModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: Method,
    weights: tuple[float, float],
) -> None:
    model, paths = two
    inject = model.base_model.inject_adapter

    def inject_and_seed(*arguments: Any) -> None:
        inject(*arguments)  # draws numbers for weights that are overwritten
        torch.manual_seed(seed_of(7, Q))

    monkeypatch.setattr(model.base_model, "inject_adapter", inject_and_seed)
    density = 0.5 if method in SPARSE else None
    rank = 2 if method.endswith("svd") else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_weighted_adapter(["one", "two"], list(weights), "both", method, svd_rank=rank, density=density)
    expected = model.base_model.model.get_submodule(Q).get_delta_weight("both").detach().numpy()
    compose(paths, tiny_base, Recipe(method, weights, density, seed=7, rank=rank), tmp_path / "both")
    assert np.abs(expected).max() > 0.05
    assert delta(tmp_path / "both") == pytest.approx(expected, abs=1e-5)


def test_it_is_an_adapter_with_its_parents(tmp_path: Path, shop: Any) -> None:
    base = shop.base
    one, two = rank_one(tmp_path / "one"), rank_one(tmp_path / "two", lora_alpha=3)
    (two / "loraplex.json").write_text(json.dumps({"quantization": {"load_in_4bit": True}}))
    made = compose([one, two], base, Recipe("svd", (0.5, 0.5)), tmp_path / "both")
    assert delta(tmp_path / "both")[0] == pytest.approx(np.full(HIDDEN, 0.5 * 0.5 + 0.5 * 1.5))
    assert [made.error, made.far] == pytest.approx([0, 0], abs=1e-6)
    assert parents(made.manifest.lineage) == [digest_of_adapter(one), digest_of_adapter(two)]
    assert made.manifest.lineage["composition"] == {
        "method": "svd",
        "weights": [0.5, 0.5],
        "majority_sign_method": "total",
        "seed": 0,
    }
    assert "quantization" not in made.manifest.lineage
    assert isinstance(shop.ingest, Ingest)
    version, new = shop.ingest.directory("both", tmp_path / "both")
    assert (new, version.manifest.digest) == (True, made.manifest.digest)
    with pytest.raises(Conflict):
        compose([one, two], base, Recipe("svd", (0.5, 0.5)), tmp_path / "both")


def test_modules_of_one_alone_are_its_own(tmp_path: Path) -> None:
    one = rank_one(tmp_path / "one")
    two = rank_one(tmp_path / "two", "model.layers.1.self_attn.q_proj")
    made = compose([one, two], base_of_ones(tmp_path), Recipe("svd", (1.0, 2.0)), tmp_path / "both")
    assert made.manifest.module_count == 2
    assert delta(tmp_path / "both", "model.layers.1.self_attn.q_proj")[0] == pytest.approx(np.full(HIDDEN, 1.0))


def test_the_limit_of_the_rank_is_kept(tmp_path: Path) -> None:
    q = np.random.default_rng(0).normal(size=(2, 4, 8)).astype(np.float32)
    paths = [
        written(tmp_path / name, {f"{Q}.lora_A.weight": values, f"{Q}.lora_B.weight": values.T}, lora_alpha=4)
        for name, values in zip("ab", q, strict=True)
    ]
    made = compose(paths, base_of_ones(tmp_path), Recipe("svd", (1.0, 1.0), rank=3), tmp_path / "both")
    assert made.ranks == (3, 3)
    values = np.linalg.svd(sum(each.T @ each for each in q))[1]
    assert made.error == pytest.approx(float(np.linalg.norm(values[3:]) / np.linalg.norm(values)), rel=1e-4)


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({"method": "ties", "weights": (1.0, 1.0)}, "density is None"),
        ({"method": "ties", "weights": (1.0, 1.0), "density": 1.5}, "density is 1.5"),
        ({"method": "svd", "weights": (1.0, 1.0), "density": 0.5}, "drops nothing"),
        ({"method": "svd", "weights": (1.0, float("nan"))}, "finite"),
        ({"method": "svd", "weights": (1.0, 1.0), "rank": 0}, "at least 1"),
        ({"method": "svd", "weights": (1.0,)}, "2 adapters and 1 weights"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused(tmp_path: Path, recipe: Any, words: str) -> None:
    paths = [rank_one(tmp_path / name) for name in ("one", "two")]
    with pytest.raises(MergeError, match=words) as refused:
        compose(paths, base_of_ones(tmp_path), Recipe(**recipe), tmp_path / "both")
    assert refused.value.code == "bad_recipe"
    assert not (tmp_path / "both").exists()


def test_ranks_that_differ_need_a_method_on_the_weights(tmp_path: Path) -> None:
    pair = {f"{Q}.lora_A.weight": np.ones((2, 8)), f"{Q}.lora_B.weight": np.ones((8, 2))}
    paths = [rank_one(tmp_path / "one"), written(tmp_path / "two", pair, r=2)]
    with pytest.raises(MergeError, match=r"ranks are \[1, 2\]"):
        compose(paths, base_of_ones(tmp_path), Recipe("linear", (1.0, 1.0)), tmp_path / "both")


def test_what_adds_no_product_to_the_weights_cannot_be_combined(tmp_path: Path) -> None:
    base = base_of_ones(tmp_path)
    norm = written(tmp_path / "norm", {"model.norm.weight": np.ones(8)}, modules_to_save=["norm"], r=1)
    ia3 = written(tmp_path / "ia3", {f"{Q}.ia3_l": np.ones((8, 1))}, peft_type="IA3")
    cases: list[tuple[Path, type[AdapterError]]] = [(norm, NotMergeable), (ia3, InvalidAdapter)]
    for path, error in cases:
        with pytest.raises(error):
            compose([rank_one(tmp_path / "one"), path], base, Recipe("svd", (1.0, 1.0)), tmp_path / "both")
