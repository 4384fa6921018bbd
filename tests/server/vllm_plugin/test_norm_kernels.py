"""vLLM's RMSNorm kernel against the definition, and left out where the norm is another."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from server.vllm_plugin.norm_kernels import forward_cpu

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")
pytestmark = pytest.mark.usefixtures("patched_vllm")

WIDTH, EPSILON = 96, 1e-5


def norm(**other: Any) -> Any:
    weight = SimpleNamespace(data=torch.linspace(0.5, 2, WIDTH).bfloat16(), dtype=torch.bfloat16)
    plain = {"has_weight": True, "variance_size_override": None, "weight": weight, "variance_epsilon": EPSILON}
    return SimpleNamespace(**plain | other)


def normed(self: Any, *given: Any) -> Any:
    return forward_cpu(lambda *_: "stock")(self, *given)


def rows(seed: int, *size: int) -> Any:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).bfloat16()


def defined(x: Any) -> Any:
    x = x.float()
    return x / (x.square().mean(-1, keepdim=True) + EPSILON).sqrt() * norm().weight.data.float()


@pytest.mark.parametrize("count", [1, 7])
def test_alone_and_with_a_residual(count: int) -> None:
    import vllm.kernels  # noqa: F401 - loads the library

    x, residual = rows(1, count, WIDTH), rows(2, count, WIDTH)
    torch.testing.assert_close(normed(norm(), x.clone()).float(), defined(x), atol=0.02, rtol=0.01)
    got, total = normed(norm(), x.clone(), residual.clone())
    torch.testing.assert_close(total, x + residual, atol=0.01, rtol=0.01)
    torch.testing.assert_close(got.float(), defined(x.float() + residual.float()), atol=0.03, rtol=0.02)


@pytest.mark.parametrize("other", [{"has_weight": False}, {"variance_size_override": 32}])
def test_another_norm_is_left_to_vllm(other: dict[str, Any]) -> None:
    assert normed(norm(**other), rows(1, 2, WIDTH)) == "stock"


def test_other_tensors_are_left_to_vllm() -> None:
    assert normed(norm(), rows(1, 2, 3, WIDTH)) == "stock"
    assert normed(norm(), rows(1, WIDTH, 2).t()) == "stock"
    assert normed(norm(), rows(1, 2, WIDTH).float()) == "stock"
    assert normed(norm(), rows(1, 2, WIDTH), rows(1, WIDTH, 2).t()) == "stock"
