"""A weight in bf16 computes what its copy in fp32 computes, to the bit."""

from __future__ import annotations

import pytest
import torch
from torch.nn import Embedding, Linear, Module

from adapters.merge.narrow import narrow_of

WORDS, WIDTH = 96, 64


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(WORDS, WIDTH, generator=torch.Generator().manual_seed(0)).bfloat16()


def test_rows_are_widened_when_they_are_looked_up(weight: torch.Tensor) -> None:
    narrow = narrow_of(Embedding(WORDS, WIDTH))
    assert narrow is not None
    narrow.hold(weight)
    found = narrow(torch.tensor([[3, 5], [3, 0]]))
    assert found.dtype == torch.float32
    assert torch.equal(found, weight.float()[torch.tensor([[3, 5], [3, 0]])])


@pytest.mark.parametrize("rows", [1, 7, WORDS])
def test_a_head_in_slices_says_what_the_whole_says(
    weight: torch.Tensor, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums over as many products, in an order that may be another: within their rounding."""
    monkeypatch.setattr("adapters.merge.narrow.SLICE_BYTES", rows * 4 * WIDTH)
    head, hidden = Linear(WIDTH, WORDS, bias=False), torch.randn(11, WIDTH)
    narrow = narrow_of(head)
    assert narrow is not None
    narrow.hold(weight)
    head.weight.data = weight.float()
    with torch.no_grad():
        assert torch.allclose(narrow(hidden), head(hidden), rtol=0, atol=1e-5)


def test_what_is_wider_than_the_model_is_rounded(weight: torch.Tensor) -> None:
    narrow = narrow_of(Embedding(WORDS, WIDTH, dtype=torch.bfloat16))
    assert narrow is not None
    exact = torch.linspace(0, 1, WORDS * WIDTH).view(WORDS, WIDTH)
    narrow.hold(exact)
    assert torch.equal(narrow(torch.arange(WORDS)), exact.bfloat16())


class Scaled(Embedding):  # type: ignore[misc]
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) * 8.0


@pytest.mark.parametrize(
    "module", [Scaled(WORDS, WIDTH), Linear(WIDTH, WORDS), Embedding(WORDS, WIDTH, max_norm=1.0)], ids=str
)
def test_what_computes_otherwise_is_left_alone(module: Module) -> None:
    assert narrow_of(module) is None
