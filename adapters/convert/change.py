"""ΔW of one module, as it is given, and the LoRA of a given rank that is nearest to it.

The nearest one in the Frobenius norm keeps the largest singular values (Eckart and Young 1936); what it leaves is
the root of the sum of squares of the others. Knows no kinds of adapters and no files.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from adapters.tensor_values import Matrix

EXACT = 1e-5
"""Relative error up to which a change counts as the same: float32 sums in another order differ by about 1e-6."""
LARGEST_EXACT_PROBLEM = 1536
"""Rows or columns, whichever are fewer, up to which the singular vectors are solved for; beyond, found by iteration."""
OVERSAMPLING, ITERATIONS = 16, 6


@dataclass(frozen=True)
class Factors:
    """ΔW = b·a."""

    b: Matrix
    """[out_features, k]"""
    a: Matrix
    """[k, in_features]"""


Change = Factors | Matrix
"""As two factors, or as ΔW itself [out_features, in_features]."""


@dataclass(frozen=True)
class Fitted:
    """A LoRA for one module and how far it is off."""

    factors: Factors
    size: float
    """‖ΔW‖ (Frobenius)"""
    off: float
    """‖ΔW - b·a‖"""

    @property
    def error(self) -> float:
        return self.off / self.size if self.size else 0.0


def fit(change: Change, rank: int) -> Fitted:
    """The LoRA of at most `rank` nearest to `change`."""
    if isinstance(change, Factors):
        inner = change.b.shape[1]
        if inner <= rank:
            return Fitted(change, _size_of_product(change), 0.0)
        if inner < min(change.b.shape[0], change.a.shape[1]):
            return _fit_factors(change, rank)
        change = change.b @ change.a
    return _fit_matrix(change, rank)


def _fit_factors(change: Factors, rank: int) -> Fitted:
    """Through the small square in the middle: b = Q·R, aᵀ = P·S, so the singular values of ΔW are those of R·Sᵀ."""
    q, r = np.linalg.qr(change.b.astype(np.float64))
    p, s = np.linalg.qr(change.a.T.astype(np.float64))
    left, values, right = np.linalg.svd(r @ s.T)
    root = np.sqrt(values[:rank])
    factors = _single(q @ left[:, :rank] * root, (root[:, None] * right[:rank]) @ p.T)
    return Fitted(factors, float(np.linalg.norm(values)), float(np.linalg.norm(values[rank:])))


def _fit_matrix(change: Matrix, rank: int) -> Fitted:
    """ΔW = V·(Vᵀ·ΔW) for V the first left singular vectors; of a wide matrix its transpose is taken."""
    if change.shape[0] > change.shape[1]:
        turned = _fit_matrix(change.T, rank)
        return Fitted(Factors(turned.factors.a.T, turned.factors.b.T), turned.size, turned.off)
    wide = change.astype(np.float64)
    vectors = leading_vectors(wide, rank)
    kept = vectors.T @ wide
    values = np.linalg.norm(kept, axis=1)
    root = np.sqrt(np.where(values > 0, values, 1))
    size = float(np.linalg.norm(wide))
    off = float(np.sqrt(max(size**2 - float(np.sum(values**2)), 0.0)))
    return Fitted(_single(vectors * root, kept / root[:, None]), size, off)


def leading_vectors(wide: np.typing.NDArray[np.float64], rank: int) -> np.typing.NDArray[np.float64]:
    """The first `rank` left singular vectors [rows, rank] of a matrix with no more rows than columns."""
    if wide.shape[0] <= LARGEST_EXACT_PROBLEM:
        return np.linalg.eigh(wide @ wide.T)[1][:, ::-1][:, :rank]
    # Halko, Martinsson and Tropp 2011, algorithm 4.4: iterate on a random subspace a little larger than needed.
    start = np.random.default_rng(0).standard_normal((wide.shape[1], rank + OVERSAMPLING))
    basis = np.linalg.qr(wide @ start)[0]
    for _ in range(ITERATIONS):
        basis = np.linalg.qr(wide @ (wide.T @ basis))[0]
    left = np.linalg.svd(basis.T @ wide, full_matrices=False)[0]
    return np.asarray(basis @ left[:, :rank])


def _size_of_product(change: Factors) -> float:
    """‖b·a‖ without the product: the trace of (bᵀ·b)·(a·aᵀ)."""
    b, a = change.b.astype(np.float64), change.a.astype(np.float64)
    return float(np.sqrt(max(float(np.sum((b.T @ b) * (a @ a.T))), 0.0)))


def _single(b: np.typing.NDArray[np.float64], a: np.typing.NDArray[np.float64]) -> Factors:
    return Factors(np.ascontiguousarray(b, np.float32), np.ascontiguousarray(a, np.float32))
