"""A layer called directly against vLLM's own way through it, on real packed NF4."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from server.vllm_plugin import direct_layers, packed_nf4
from tests.server.vllm_plugin.layers import SLOTS, lora_layer, wrapper
from tests.server.vllm_plugin.test_packed_nf4 import METHOD, dequantised, draw, layer

torch = pytest.importorskip("torch")

pytestmark = [
    pytest.mark.usefixtures("patched_vllm"),
    pytest.mark.skipif(not packed_nf4.available(), reason="the processor has no AVX512-BF16"),
]

WIDTH, OUTS, RANK = 64, (32, 16, 16), 4


def adapted(row_slots: list[int]) -> tuple[Any, Any, list[Any]]:
    """A qkv layer with an adapter in every slot, its dequantised weight, and each slot's delta [out, in]."""
    made = lora_layer("QKVParallelLinear", WIDTH, OUTS, RANK, wrapper(row_slots))
    weight, states = layer(OUTS, WIDTH)
    made.base_layer.packed_nf4 = packed_nf4.pack(weight, states)
    stock = packed_nf4.apply_4bit_weight(lambda *_: None)
    made.base_layer.quant_method = SimpleNamespace(apply=lambda *arguments: stock(METHOD, *arguments))
    deltas = []
    for slot in range(SLOTS):
        a = [draw(RANK, WIDTH, seed=10 * slot + number) / 8 for number in range(3)]
        b = [draw(out, RANK, seed=100 + 10 * slot + number) for number, out in enumerate(OUTS)]
        made.set_lora(slot, a, b)
        deltas.append(torch.cat([each_b @ each_a for each_a, each_b in zip(a, b, strict=True)]))
    return made, dequantised(weight, states), deltas


@pytest.mark.parametrize("row_slots", [[-1], [2], [0, 0, 0], [1, -1, 0, 2, -1], [1] * 40, [1] * 40 + [0, -1, 2]])
@pytest.mark.parametrize("bf16_slots", [True, False])
def test_it_computes_what_vllms_own_way_computes(
    row_slots: list[int], bf16_slots: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype = torch.bfloat16 if bf16_slots else torch.float32
    monkeypatch.setattr("tests.server.vllm_plugin.layers.DTYPE", dtype)
    made, weight, deltas = adapted(row_slots)
    x = draw(len(row_slots), WIDTH, seed=3).bfloat16()

    got = direct_layers.call(made, x, None)

    assert made.direct.slots.dtype == dtype
    assert torch.equal(got, made._apply_sync(x, None))
    weights = [weight + deltas[slot] if slot >= 0 else weight for slot in row_slots]
    wanted = [each @ row.float() for each, row in zip(weights, x, strict=True)]
    torch.testing.assert_close(got.float(), torch.stack(wanted), atol=0.2, rtol=0.02)


def test_the_next_step_has_its_own_rows() -> None:
    made, *_ = adapted([0, 1])
    x = draw(2, WIDTH, seed=3).bfloat16()
    first = direct_layers.call(made, x, None)
    made.punica_wrapper.token_rows = wrapper([1, 0]).token_rows
    second = direct_layers.call(made, x.flip(0), None)
    assert torch.equal(second.flip(0), first)


@pytest.mark.parametrize("what", ["bias", "three dimensions", "another type", "rows that the step does not have"])
def test_what_it_does_not_know_goes_vllms_way(what: str) -> None:
    made, *_ = adapted([-1, -1] if what.startswith("rows") else [2, 0])
    x, bias = draw(2, WIDTH, seed=3).bfloat16(), None
    if what == "bias":
        bias = draw(sum(OUTS), seed=4).bfloat16()
    elif what == "three dimensions":
        x = x[None]
    elif what == "another type":
        x = x.half()
    else:
        made.punica_wrapper.token_rows = wrapper([2, 0, 1]).token_rows
        made._apply_sync = lambda *_: "vLLM's way"
    direct_layers.call(made, x, bias)
    assert made.direct(x, bias) is None


def test_rows_of_a_wider_tensor() -> None:
    made, *_ = adapted([2, 0])
    wide = draw(2, 3 * WIDTH, seed=3).bfloat16()
    for x in (wide[:, WIDTH : 2 * WIDTH], wide[:, ::3]):
        assert torch.equal(direct_layers.call(made, x, None), direct_layers.call(made, x.contiguous(), None))


def test_a_weight_that_is_not_packed_has_no_short_cut() -> None:
    made, *_ = adapted([0])
    del made.base_layer.packed_nf4
    assert direct_layers.Direct.of(made) is None
