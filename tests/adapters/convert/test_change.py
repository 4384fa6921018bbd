"""The nearest LoRA of a rank, and how far it is: answers known by hand, or by NumPy's own SVD."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from adapters.convert import change
from adapters.convert.aside import aside
from adapters.convert.change import EXACT, Factors, fit
from adapters.tensor_values import Matrix


def diagonal(*values: float, columns: int | None = None) -> Matrix:
    matrix = np.zeros((len(values), columns or len(values)), np.float32)
    np.fill_diagonal(matrix, values)
    return matrix


def product(found: change.Fitted) -> Matrix:
    return found.factors.b @ found.factors.a


def test_what_fits_is_kept_as_it_is() -> None:
    given = Factors(np.ones((3, 2), np.float32), np.ones((2, 5), np.float32))
    found = fit(given, 2)
    assert found.factors is given
    assert (found.off, found.error) == (0, 0)
    assert found.size == pytest.approx(2 * np.sqrt(15))


@pytest.mark.parametrize("columns", [4, 6])
def test_the_largest_singular_values_stay(columns: int) -> None:
    found = fit(diagonal(3, 1, 4, 0, columns=columns), 2)
    np.testing.assert_allclose(product(found), diagonal(3, 0, 4, 0, columns=columns), atol=1e-6)
    assert found.size == pytest.approx(np.sqrt(26))
    assert found.off == pytest.approx(1)


def test_of_factors_too_and_of_a_tall_matrix() -> None:
    square = diagonal(3, 1, 4, 0, 0)
    b, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((5, 5)))
    for given in (Factors((square @ b).astype(np.float32), b.T.astype(np.float32)), diagonal(3, 1, 4, columns=9).T):
        found = fit(given, 2)
        assert found.factors.a.shape[0] == 2
        assert found.off == pytest.approx(1, rel=1e-5)


def test_zero_stays_zero() -> None:
    found = fit(np.zeros((4, 6), np.float32), 2)
    assert (found.error, float(np.abs(product(found)).max())) == (0, 0)


@pytest.mark.parametrize("shape", [(40, 60), (60, 40)])
@pytest.mark.parametrize("inner", [20, 60])
def test_as_good_as_the_svd_and_the_error_is_the_true_one(shape: tuple[int, int], inner: int) -> None:
    random = np.random.default_rng(1)
    given = Factors(
        *(random.standard_normal(size).astype(np.float32) for size in ((shape[0], inner), (inner, shape[1])))
    )
    whole = given.b @ given.a
    values = np.linalg.svd(whole, compute_uv=False)
    found = fit(given, 8)
    assert found.off == pytest.approx(float(np.linalg.norm(values[8:])), rel=1e-4)
    assert float(np.linalg.norm(whole - product(found))) == pytest.approx(found.off, rel=1e-4)


def test_a_rank_that_is_there_only_by_name_costs_nothing() -> None:
    random = np.random.default_rng(2)
    b, a = random.standard_normal((50, 8)).astype(np.float32), random.standard_normal((8, 70)).astype(np.float32)
    padded = Factors(np.hstack([b, b]), np.vstack([a, 2 * a]))
    found = fit(padded, 8)
    assert found.error < EXACT
    np.testing.assert_allclose(product(found), 3 * b @ a, atol=1e-4)


def test_large_ones_are_found_by_iteration_nearly_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(3)
    decaying = random.standard_normal((80, 80)) @ np.diag(0.8 ** np.arange(80)) @ random.standard_normal((80, 120))
    best = fit(decaying.astype(np.float32), 8)
    monkeypatch.setattr(change, "LARGEST_EXACT_PROBLEM", 10)
    found = fit(decaying.astype(np.float32), 8)
    assert found.off == pytest.approx(best.off, rel=1e-3)
    assert float(np.linalg.norm(decaying - product(found))) == pytest.approx(found.off, rel=1e-3)


def test_aside_gives_the_result_or_the_error_of_another_thread() -> None:
    assert aside(threading.get_ident) != threading.get_ident()
    with pytest.raises(ZeroDivisionError):
        aside(lambda: 1 // 0)
