"""The packed kernel against the dequantised weight, and its layout against bitsandbytes' own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from server.vllm_plugin import packed_nf4

torch = pytest.importorskip("torch")
functional = pytest.importorskip("bitsandbytes").functional

with_kernel = pytest.mark.skipif(not packed_nf4.available(), reason="the processor has no AVX512-BF16")


def draw(*size: int, seed: int = 0) -> Any:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def layer(outs: tuple[int, ...], width: int, *, nested: bool = True, blocksize: int = 64) -> tuple[Any, list[Any]]:
    """The weight of a layer of so many parts as vLLM holds it, and a state a part."""
    parts = [
        functional.quantize_4bit(
            draw(out, width, seed=number), blocksize=blocksize, quant_type="nf4", compress_statistics=nested
        )
        for number, out in enumerate(outs)
    ]
    return torch.cat([packed for packed, _ in parts]), [state for _, state in parts]


def dequantised(weight: Any, states: list[Any]) -> Any:
    pieces = weight.reshape(-1).split([state.shape.numel() // 2 for state in states])
    return torch.cat(
        [functional.dequantize_4bit(piece.unsqueeze(1), state) for piece, state in zip(pieces, states, strict=True)]
    ).float()


@pytest.mark.parametrize("nested", [True, False])
def test_the_layout_is_bitsandbytes_own(nested: bool) -> None:
    weight, states = layer((96,), 128, nested=nested)
    packed = packed_nf4.pack(weight, states)
    assert packed is not None
    theirs, state = functional._convert_weight_packed_for_cpu(weight, states[0])
    assert torch.equal(packed.codes, theirs)
    assert torch.equal(packed.scales, state.absmax)


@with_kernel
@pytest.mark.parametrize("rows", [1, 2, 3, 8, 31, 32, 33, 200])
@pytest.mark.parametrize("outs", [(64,), (64, 32, 32), (48, 16)])
@pytest.mark.parametrize("nested", [True, False])
def test_a_product_is_that_of_the_dequantised_weight(rows: int, outs: tuple[int, ...], nested: bool) -> None:
    weight, states = layer(outs, 192, nested=nested)
    packed = packed_nf4.pack(weight, states)
    assert packed is not None
    x = draw(rows, 192, seed=9).bfloat16()
    wanted = x.float() @ dequantised(weight, states).t()
    got = packed @ x
    assert got.dtype == torch.bfloat16
    assert (got.float() - wanted).norm() < packed_nf4.TOLERANCE * wanted.norm()
    assert packed_nf4.is_right(packed, weight, states)


@with_kernel
def test_rows_of_a_wider_tensor() -> None:
    weight, states = layer((64,), 64)
    packed = packed_nf4.pack(weight, states)
    assert packed is not None
    wide = draw(5, 200).bfloat16()
    for x in (wide[:, 8:72], wide.t()[:64].t(), wide[::2, :64]):
        torch.testing.assert_close(packed @ x, packed @ x.contiguous(), atol=0, rtol=0)


@with_kernel
@pytest.mark.parametrize("damage", ["a byte", "a scale", "nan"])
def test_a_wrong_product_is_noticed(damage: str) -> None:
    weight, states = layer((64,), 64)
    packed = packed_nf4.pack(weight, states)
    assert packed is not None
    if damage == "a byte":
        packed.codes[17] ^= 0xFF
    else:
        packed.scales[0, :4] = torch.nan if damage == "nan" else 3.0
    assert not packed_nf4.is_right(packed, weight, states)


@pytest.mark.parametrize(
    ("outs", "width", "blocksize"), [((24,), 64, 64), ((32,), 96, 64), ((16, 8), 64, 64), ((32,), 64, 128)]
)
def test_what_does_not_fit_the_layout_is_left_alone(outs: tuple[int, ...], width: int, blocksize: int) -> None:
    assert packed_nf4.pack(*layer(outs, width, blocksize=blocksize)) is None


def test_another_code_is_left_alone() -> None:
    packed, state = functional.quantize_4bit(draw(32, 64), quant_type="fp4")
    assert packed_nf4.pack(packed, [state]) is None


def loaded(outs: tuple[int, ...], width: int) -> Any:
    """A layer of vLLM's after its weights were loaded."""
    weight, states = layer(outs, width)
    parameter = torch.nn.Parameter(weight, requires_grad=False)
    parameter.bnb_quant_state = dict(enumerate(states))
    made = torch.nn.Module()
    made.register_parameter("weight", parameter)
    return made


METHOD = SimpleNamespace(quant_config=SimpleNamespace(load_in_8bit=False))


def finish(made: Any) -> None:
    packed_nf4.process_weights_after_loading(lambda *_: None)(METHOD, made)


def apply(made: Any, x: Any, bias: Any = None) -> Any:
    return packed_nf4.apply_4bit_weight(lambda *_: "stock")(METHOD, made, x, bias)


@with_kernel
@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 3, 64)])
def test_a_loaded_layer_multiplies_and_holds_its_weight_once(shape: tuple[int, ...]) -> None:
    made = loaded((32, 32), 64)
    weight = dequantised(made.weight.data, list(made.weight.bnb_quant_state.values()))
    finish(made)
    assert made.weight.numel() == 0
    x, bias = draw(*shape, seed=5).half(), draw(64, seed=6).half()
    got = apply(made, x, bias)
    assert (got.dtype, got.shape) == (torch.half, (*shape[:-1], 64))
    torch.testing.assert_close(got.float(), x.float() @ weight.t() + bias.float(), atol=0.3, rtol=0.02)


@with_kernel
def test_a_layer_that_is_computed_wrongly_stays_as_it_was(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = loaded((32,), 64)
    before = made.weight.data.clone()
    monkeypatch.setattr(packed_nf4, "interleave", lambda codes: codes)
    finish(made)
    assert torch.equal(made.weight.data, before)
    assert apply(made, draw(1, 64)) == "stock"
    assert "stays slow" in caplog.text


def test_without_the_instructions_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional, "has_avx512bf16", lambda: False)
    made = loaded((32,), 64)
    finish(made)
    assert made.weight.numel() == 32 * 32
    assert apply(made, draw(1, 64)) == "stock"


@with_kernel
def test_a_compiled_layer_multiplies_as_ever_and_is_not_looked_into() -> None:
    first, second = loaded((64, 32), 128), loaded((32,), 128)
    for made in (first, second):
        finish(made)
    x = draw(3, 128, seed=5).bfloat16()
    compiled = torch.compile(
        lambda rows: apply(first, rows)[:, :32] + apply(second, rows), fullgraph=True, backend="eager"
    )
    torch.testing.assert_close(compiled(x), apply(first, x)[:, :32] + apply(second, x), atol=0, rtol=0)
