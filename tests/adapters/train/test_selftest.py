"""The numbers of bitsandbytes are tried before a run; here on layers that its kernels get wrong."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import bitsandbytes
import pytest
import torch

from adapters.errors import TrainError
from adapters.nf4 import Mismatch, keep_unpacked
from adapters.train import selftest
from tests.adapters.test_nf4 import HAS_AVX512


def four_bit(columns: int, rows: int = 32) -> Any:
    layer = bitsandbytes.nn.LinearNF4(columns, rows, bias=False, compute_dtype=torch.bfloat16).to("cpu")
    keep_unpacked(layer)
    return layer


@pytest.mark.skipif(not HAS_AVX512, reason="the defect is in bitsandbytes' AVX512 branch; this CPU has none")
def test_a_shape_that_is_misread_is_reported_and_then_read_rightly() -> None:
    script = (
        "import torch\n"
        "from tests.adapters.train.test_selftest import four_bit\n"
        "from adapters.train.selftest import check_numerics\n"
        "model = torch.nn.Sequential(four_bit(96), four_bit(64))\n"
        "print(*check_numerics(model), sep='|')\n"
        "print(check_numerics(model))\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == [
        "bitsandbytes misreads 4-bit weights of shape 32×96 here; they are read in another way",
        "()",
    ]


def test_right_layers_leave_no_note_and_are_left_as_they_were() -> None:
    model = torch.nn.Sequential(four_bit(64, 64), four_bit(64, 64), four_bit(128)).eval()
    before, state = [layer.weight.data.clone() for layer in model], torch.get_rng_state()
    assert selftest.check_numerics(model) == ()
    assert all(torch.equal(layer.weight.data, was) for layer, was in zip(model, before, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(layer.training for layer in model)


def test_a_model_without_4_bit_layers_has_nothing_to_try() -> None:
    assert selftest.check_numerics(torch.nn.Linear(4, 4)) == ()


@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")
@pytest.mark.skipif(not bitsandbytes.functional.has_avx512bf16(), reason="only a CPU with AVX512-BF16 repacks weights")
def test_a_layer_that_an_evaluation_would_repack_is_caught() -> None:
    layer = four_bit(64)
    layer.support_avx512bf16_for_cpu = True
    with pytest.raises(TrainError, match="after an evaluation, the gradient") as caught:
        selftest.check_numerics(layer)
    assert caught.value.code == "wrong_kernel"


def test_a_shape_that_stays_wrong_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "repair_dequantize", lambda: None)
    monkeypatch.setattr(selftest, "self_test", lambda shapes: [Mismatch((32, 96), 64, 0.25)])
    with pytest.raises(TrainError, match=r"shape \(32, 96\) back with a relative error of 0\.25"):
        selftest.check_numerics(four_bit(96))
