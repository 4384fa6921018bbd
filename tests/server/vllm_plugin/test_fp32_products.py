"""4-bit products where bf16 is emulated: the same numbers, rounded once, and reached from every 4-bit layer."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from adapters import processor
from server.vllm_plugin import fp32_products

torch = pytest.importorskip("torch")
bitsandbytes = pytest.importorskip("bitsandbytes")


def random(*shape: int, seed: int = 0) -> Any:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def product(rows: Any, packed: Any, state: Any, bias: Any = None) -> Any:
    """Through our kernel, with the arguments that `bitsandbytes.matmul_4bit` gives the operator."""
    if not state.nested:
        return fp32_products.gemm_4bit(rows, packed, state.shape, state.absmax, state.blocksize, "nf4", bias)
    nest = (state.absmax, state.state2.code, state.offset)
    return fp32_products.gemm_4bit(rows, packed, state.shape, state.state2.absmax, state.blocksize, "nf4", bias, *nest)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(64,), (1, 64), (5, 64), (2, 3, 64)])
def test_the_product_is_the_exact_one_rounded_once(nested: bool, dtype: Any, shape: tuple[int, ...]) -> None:
    packed, state = bitsandbytes.functional.quantize_4bit(random(32, 64), quant_type="nf4", compress_statistics=nested)
    rows, bias = random(*shape, seed=1).to(dtype), random(32, seed=2).to(dtype)
    weight = bitsandbytes.functional.dequantize_4bit(packed, state).double()
    for added in (None, bias):
        got = product(rows, packed, state, added)
        exact = rows.double() @ weight.T + (0 if added is None else added.double())
        assert got.dtype == dtype
        tolerance = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
        torch.testing.assert_close(got.double(), exact, rtol=tolerance, atol=1e-4)


def reached(bf16: bool) -> str:
    """What a layer's forward gives in a fresh process whose processor has, or has not, bf16 instructions."""
    script = f"""
import torch, bitsandbytes
from adapters import processor
from server.vllm_plugin import fp32_products
processor.multiplies_bf16 = lambda: {bf16}
calls, kernel = [], fp32_products.gemm_4bit
fp32_products.gemm_4bit = lambda *given: calls.append(given[0].dtype) or kernel(*given)
library = fp32_products.widen_products()
assert fp32_products.widen_products() is library
layer = bitsandbytes.nn.LinearNF4(64, 32, bias=False, compute_dtype=torch.bfloat16).to("cpu")
layer.support_avx512bf16_for_cpu = False
rows = torch.randn(3, 64, dtype=torch.bfloat16)
with torch.no_grad():
    got = layer(rows)
weight = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
torch.testing.assert_close(got.float(), rows.float() @ weight.float().T, rtol=0.02, atol=0.02)
print(calls)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_without_bf16_instructions_every_layer_takes_it() -> None:
    assert reached(bf16=False) == "[torch.bfloat16]"


def test_with_bf16_instructions_nothing_is_replaced() -> None:
    assert reached(bf16=True) == "[]"


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx2": True, "avx512_f": True, "avx512_bf16": False}, False),
        ({"avx512_bf16": True}, True),
        ({"avx512_bf16": False, "amx_bf16": True}, True),
        ({"neon": True}, False),
        ({"neon": True, "bf16": True}, True),
    ],
)
def test_instructions_are_read_from_what_torch_found(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], expected: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert processor.multiplies_bf16() is expected
