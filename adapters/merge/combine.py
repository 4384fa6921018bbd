"""The changes that several adapters make of one module, combined into one: PEFT's methods by PEFT's names and maths.

Those without `_svd` work on A and on B apart (cheap and rough: Σ wᵢAᵢ times Σ wᵢBᵢ is not Σ wᵢBᵢAᵢ); the others on ΔW
itself, and then keep its largest singular values. Knows no files.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from adapters.convert.change import Factors, Fitted, fit
from adapters.errors import MergeError
from adapters.tensor_values import Matrix

if TYPE_CHECKING:
    import torch

Method = Literal[
    "linear",
    "cat",
    "svd",
    "ties",
    "ties_svd",
    "dare_linear",
    "dare_linear_svd",
    "dare_ties",
    "dare_ties_svd",
    "magnitude_prune",
    "magnitude_prune_svd",
]
METHODS: tuple[Method, ...] = get_args(Method)
SPARSE = tuple(name for name in METHODS if name.startswith(("ties", "dare", "magnitude")))
"""Those that need a density."""
ON_FACTORS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
SignMethod = Literal["total", "frequency"]


def bad_recipe(message: str) -> MergeError:
    return MergeError(message, code="bad_recipe")


@dataclass(frozen=True)
class Recipe:
    """How adapters are combined."""

    method: Method
    weights: tuple[float, ...]
    """One for each adapter; may be negative."""
    density: float | None = None
    """The share of values that is kept."""
    majority_sign_method: SignMethod = "total"
    seed: int = 0
    """Of what DARE drops."""
    rank: int | None = None
    """The largest that the result may have; None: as it comes."""

    def __post_init__(self) -> None:
        """Raises MergeError."""
        if not self.weights or not all(math.isfinite(weight) for weight in self.weights):
            raise MergeError(
                f"weights are {self.weights}, expected a finite number for each adapter", code="bad_recipe"
            )
        if self.method in SPARSE and not (self.density is not None and 0 < self.density <= 1):
            raise bad_recipe(
                f"density is {self.density}, expected a number above 0 and at most 1: the share of values that "
                f"{self.method} keeps"
            )
        if self.method not in SPARSE and self.density is not None:
            raise MergeError(
                f"density is {self.density}, but {self.method} drops nothing; leave it out", code="bad_recipe"
            )
        if self.rank is not None and self.rank < 1:
            raise bad_recipe(f"the rank is {self.rank}, expected at least 1")


@dataclass(frozen=True)
class Part:
    """What one adapter adds to one module: scale·b·a, or ΔW itself."""

    weight: float
    change: Factors | Matrix
    scale: float = 1.0

    @property
    def delta(self) -> Matrix:
        if isinstance(self.change, Factors):
            return np.asarray(self.change.b @ self.change.a * np.float32(self.scale), np.float32)
        return np.asarray(self.change * np.float32(self.scale), np.float32)


@dataclass(frozen=True)
class Combined:
    """Of one module."""

    fitted: Fitted
    """The result, and what its rank left out."""
    far: float
    """‖result - Σ wᵢ·ΔWᵢ‖: how far the method went from the plain sum."""
    sum_size: float


def combine(module: str, parts: Sequence[Part], recipe: Recipe) -> Combined:
    """`parts`: of the adapters that change this module. Raises MergeError where the method cannot have them."""
    fitted = _fitted(module, parts, recipe)
    plain = sum(
        (part.delta * np.float32(part.weight) for part in parts[1:]), parts[0].delta * np.float32(parts[0].weight)
    )
    got = fitted.factors.b @ fitted.factors.a
    return Combined(fitted, float(np.linalg.norm(got - plain)), float(np.linalg.norm(plain)))


def seed_of(seed: int, module: str) -> int:
    """Each module has its own, so that the order of modules does not matter."""
    return int.from_bytes(hashlib.sha256(f"{seed} {module}".encode()).digest()[:8], "big") >> 1


def _fitted(module: str, parts: Sequence[Part], recipe: Recipe) -> Fitted:
    if recipe.method in ON_FACTORS:
        return _limited(_on_factors(module, parts, recipe), recipe)
    if recipe.method in ("cat", "svd") and all(isinstance(part.change, Factors) for part in parts):
        return _limited(_side_by_side(parts), recipe)
    return _limited(_on_deltas(module, parts, recipe), recipe)


def _limited(change: Factors | Matrix, recipe: Recipe) -> Fitted:
    most = min(change.shape) if isinstance(change, np.ndarray) else change.b.shape[1]
    return fit(change, min(recipe.rank or most, most))


def _side_by_side(parts: Sequence[Part]) -> Factors:
    """The sum itself, its rank the sum of their ranks."""
    changes = [part.change for part in parts if isinstance(part.change, Factors)]
    scales = [np.float32(part.weight * part.scale) for part in parts]
    b = np.hstack([change.b * scale for change, scale in zip(changes, scales, strict=True)])
    return Factors(b, np.vstack([change.a for change in changes]))


def _on_factors(module: str, parts: Sequence[Part], recipe: Recipe) -> Factors:
    """Each side gets the root of the weight, and A its sign, as in PEFT's `add_weighted_adapter`."""
    import torch

    changes = [part.change for part in parts]
    pairs = [change for change in changes if isinstance(change, Factors)]
    ranks = [change.a.shape[0] for change in pairs]
    if len(pairs) < len(changes) or len(set(ranks)) > 1:
        found = f"their ranks are {ranks}" if len(pairs) == len(changes) else "one of them is no such product"
        raise bad_recipe(
            f"{recipe.method} combines A with A and B with B, and {found} ({module}); take svd, or a method that ends "
            "in _svd"
        )
    whole = [part.weight * part.scale for part in parts]
    roots = torch.tensor([math.sqrt(abs(weight)) for weight in whole])
    signs = torch.tensor([1.0 if weight >= 0 else -1.0 for weight in whole])
    with _seeded(seed_of(recipe.seed, module)):
        a = _method(recipe, [torch.from_numpy(change.a) for change in pairs], roots * signs)
        b = _method(recipe, [torch.from_numpy(change.b) for change in pairs], roots)
    return Factors(b.numpy(), a.numpy())


def _on_deltas(module: str, parts: Sequence[Part], recipe: Recipe) -> Matrix:
    import torch

    weights = torch.tensor([part.weight for part in parts], dtype=torch.float32)
    with _seeded(seed_of(recipe.seed, module)):
        found: Matrix = _method(recipe, [torch.from_numpy(part.delta) for part in parts], weights).numpy()
    return found


def _method(recipe: Recipe, tensors: list[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
    from peft.utils import merge_utils

    name = recipe.method.removesuffix("_svd")
    if name in ("linear", "cat", "svd"):
        return _checked(merge_utils.task_arithmetic(tensors, weights))
    options: dict[str, Any] = {"density": recipe.density}
    if name in ("ties", "dare_ties"):
        options["majority_sign_method"] = recipe.majority_sign_method
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a density of 1, which drops nothing
        return _checked(getattr(merge_utils, name)(tensors, weights, **options))


def _checked(found: Any) -> torch.Tensor:
    import torch

    assert isinstance(found, torch.Tensor)
    return found.float()


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """PEFT draws from torch's one generator."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
