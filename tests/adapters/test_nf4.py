"""NF4 on the CPU: the format by hand, and bitsandbytes' two defects, shown where this CPU has them and repaired."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from adapters import nf4
from adapters.errors import TrainError

torch = pytest.importorskip("torch")
bitsandbytes = pytest.importorskip("bitsandbytes")

HAS_AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
ROW_LENGTHS = (*range(16, 641, 16), 17, 34, 70, 98)


def run_alone(script: str) -> str:
    """Run in a fresh process: the repair cannot be taken back, so the stock kernel has to be asked elsewhere."""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def repaired() -> None:
    nf4.repair_dequantize()


def quantize(shape: tuple[int, ...], blocksize: int = 64, quant_type: str = "nf4") -> tuple[Any, Any]:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    packed, state = bitsandbytes.functional.quantize_4bit(weight, blocksize=blocksize, quant_type=quant_type)
    return packed, state


def expected(packed: Any, state: Any) -> Any:
    return nf4.reference_dequantize(packed, state.absmax, state.code, state.blocksize, state.shape, torch.float32)


def test_reference_known_answer() -> None:
    # Two values a byte, high half first; blocks of 4 run across the rows of 3, and the last block is short.
    packed = torch.tensor([0xF0, 0x7F, 0x0F], dtype=torch.uint8)
    absmax = torch.tensor([2.0, 10.0])
    got = nf4.reference_dequantize(packed, absmax, torch.tensor(nf4.NF4_CODE), 4, (2, 3), torch.float32)
    assert got.tolist() == [[2.0, -2.0, 0.0], [2.0, -10.0, 10.0]]


def test_reference_odd_count_ignores_the_last_half_byte() -> None:
    packed = torch.tensor([0xF0, 0x0F], dtype=torch.uint8)
    got = nf4.reference_dequantize(packed, torch.tensor([1.0]), torch.tensor(nf4.NF4_CODE), 64, (3,), torch.bfloat16)
    assert got.dtype == torch.bfloat16
    assert got.tolist() == [1.0, -1.0, -1.0]


def test_our_code_table_is_the_one_of_bitsandbytes() -> None:
    assert torch.equal(torch.tensor(nf4.NF4_CODE), bitsandbytes.functional.get_4bit_type("nf4", device="cpu"))


@pytest.mark.parametrize("blocksize", [64, 128])
@pytest.mark.usefixtures("repaired")
def test_repaired_equals_reference(blocksize: int) -> None:
    for columns in ROW_LENGTHS:
        for rows in (7, 24, 256):  # 7: no whole number of blocks
            packed, state = quantize((rows, columns), blocksize)
            got = bitsandbytes.functional.dequantize_4bit(packed, state)
            assert torch.equal(got, expected(packed, state)), (rows, columns, blocksize)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.usefixtures("repaired")
def test_repaired_rounds_to_the_asked_type(dtype: Any) -> None:
    packed, state = quantize((24, 96))
    state.dtype = dtype
    got = bitsandbytes.functional.dequantize_4bit(packed, state)
    assert torch.equal(got, expected(packed, state).to(dtype))


@pytest.mark.usefixtures("repaired")
def test_repaired_fp4() -> None:
    packed, state = quantize((24, 96), quant_type="fp4")
    assert torch.equal(bitsandbytes.functional.dequantize_4bit(packed, state), expected(packed, state))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.usefixtures("repaired")
def test_repair_reaches_the_layer_forward_and_backward(nested: bool) -> None:
    layer = bitsandbytes.nn.LinearNF4(96, 40, bias=False, compute_dtype=torch.float32, compress_statistics=nested).to(
        "cpu"
    )
    assert nf4.keep_unpacked(layer) == 1
    state = layer.weight.quant_state
    plain = bitsandbytes.functional.dequantize_4bit(layer.weight.data, state)
    if not nested:
        assert torch.equal(plain, expected(layer.weight.data, state))
    rows = torch.randn(5, 96, requires_grad=True)
    layer(rows).sum().backward()
    torch.testing.assert_close(layer(rows), rows @ plain.T)
    torch.testing.assert_close(rows.grad, plain.sum(0).expand(5, 96))


@pytest.mark.usefixtures("repaired")
def test_repair_is_idempotent_and_self_test_is_clean() -> None:
    library = nf4._library
    nf4.repair_dequantize()
    assert nf4._library is library
    assert nf4.self_test([(256, 96), (256, 576), (96, 16)]) == []


@pytest.mark.skipif(not HAS_AVX512, reason="the defect is in bitsandbytes' AVX512 branch; this CPU has none")
def test_stock_kernel_is_wrong_here_and_self_test_says_so() -> None:
    """The day bitsandbytes is repaired this fails: then drop `repair_dequantize`."""
    script = "from adapters import nf4; print([m.shape for m in nf4.self_test([(256, 96), (256, 64), (40, 16)])])"
    assert run_alone(script) == "[(40, 16), (256, 96)]"


def test_repair_under_a_bfloat16_default_leaves_quantisation_alone() -> None:
    """vLLM builds models under such a default, and bitsandbytes keeps the first code table it makes."""
    script = """
import torch
from adapters import nf4
torch.set_default_dtype(torch.bfloat16)
nf4.repair_dequantize()
torch.set_default_dtype(torch.float32)
from bitsandbytes.backends.utils import _get_4bit_code
print(torch.equal(_get_4bit_code("nf4", torch.device("cpu")), torch.tensor(nf4.NF4_CODE)), nf4.self_test([(64, 96)]))
"""
    assert run_alone(script) == "True []"


def test_importing_costs_neither_torch_nor_bitsandbytes() -> None:
    script = "import sys, adapters.nf4; print('torch' in sys.modules, 'bitsandbytes' in sys.modules)"
    assert run_alone(script) == "False False"


def four_bit_layer() -> Any:
    return bitsandbytes.nn.LinearNF4(64, 32, bias=False, compute_dtype=torch.bfloat16).to("cpu")


def test_keep_unpacked_survives_an_eval_forward() -> None:
    model = torch.nn.Sequential(four_bit_layer(), torch.nn.Linear(32, 4))
    assert nf4.keep_unpacked(model) == 1
    before = model[0].weight.data.clone()
    with torch.no_grad():
        model[0].eval()(torch.randn(1, 64, dtype=torch.bfloat16))
    assert torch.equal(model[0].weight.data, before)


@pytest.mark.skipif(not bitsandbytes.functional.has_avx512bf16(), reason="only a CPU with AVX512-BF16 repacks weights")
def test_stock_eval_forward_repacks_and_keep_unpacked_comes_too_late() -> None:
    layer = four_bit_layer()
    before = layer.weight.data.clone()
    with torch.no_grad():
        layer.eval()(torch.randn(1, 64, dtype=torch.bfloat16))
    assert not torch.equal(layer.weight.data.view(-1), before.view(-1))
    with pytest.raises(TrainError, match="already repacked"):
        nf4.keep_unpacked(layer)


def test_layer_shapes() -> None:
    assert nf4.layer_shapes(torch.nn.Sequential(four_bit_layer(), four_bit_layer())) == [(32, 64)]
