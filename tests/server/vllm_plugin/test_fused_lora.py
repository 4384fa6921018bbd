"""The fused layout against a loop over rows written by hand, and inside vLLM's own layers."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.vllm_plugin import fused_lora
from server.vllm_plugin.adapter_rows import AdapterRows
from tests.server.vllm_plugin.layers import lora_layer, wrapper

torch = pytest.importorskip("torch")

SLOTS, RANK, INPUTS = 4, 3, 6
WIDTHS = (5, 2, 2)  # the output slices of qkv

slots = st.lists(st.integers(-1, SLOTS - 1), min_size=1, max_size=9)


def draw(seed: int, *size: int) -> Any:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def stacks(widths: tuple[int, ...] = WIDTHS) -> tuple[list[Any], list[Any]]:
    """As vLLM keeps them: A [slots, 1, rank, in] and B [slots, 1, out, rank], one for each slice."""
    a = [draw(number, SLOTS, 1, RANK, INPUTS) for number in range(len(widths))]
    return a, [draw(10 + number, SLOTS, 1, width, RANK) for number, width in enumerate(widths)]


def expected(y: Any, x: Any, a: list[Any], b: list[Any], row_slots: list[int]) -> Any:
    """Row by row, in fp32."""
    wanted = y.clone().float()
    for row, slot in enumerate(row_slots):
        if slot >= 0:
            wanted[row] += torch.cat(
                [each_b[slot, 0] @ each_a[slot, 0] @ x[row].float() for each_a, each_b in zip(a, b, strict=True)]
            )
    return wanted


def pointer(tensor: Any) -> int:
    return int(tensor.untyped_storage().data_ptr())


def added(y: Any, x: Any, a: list[Any], b: list[Any], row_slots: list[int]) -> Any:
    fused_lora.fuse(a, b)[0].slots.add(AdapterRows.of(torch.tensor(row_slots)), y, x)
    return y


@given(row_slots=slots.filter(lambda each: max(each) >= 0), widths=st.sampled_from([WIDTHS, (5,), (4, 4)]))
@settings(max_examples=100, deadline=None)
def test_any_mixture_of_rows(row_slots: list[int], widths: tuple[int, ...]) -> None:
    a, b = stacks(widths)
    x, y = draw(1, len(row_slots), INPUTS), draw(2, len(row_slots), sum(widths))
    wanted = expected(y, x, a, b, row_slots)
    torch.testing.assert_close(added(y, x, a, b, row_slots), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "row_slots", [[2] * 200, [-1, 0, 1, 3] * 50, [-1] * 150 + [1] * 50, [0] + [3] * 40, [0, 1] * 9 + [2] * 33 + [-1]]
)
def test_long_batches_and_long_ones_beside_short_ones(row_slots: list[int]) -> None:
    a, b = stacks()
    x, y = draw(1, len(row_slots), INPUTS), draw(2, len(row_slots), sum(WIDTHS))
    wanted = expected(y, x, a, b, row_slots)
    torch.testing.assert_close(added(y, x, a, b, row_slots), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("row_slots", [[1, 1], [-1, 0, 1, 3], [3, -1] * 50, [2] * 100])
@pytest.mark.parametrize(("emulated", "dtype"), [(True, "float32"), (False, "bfloat16")])
@pytest.mark.parametrize("small", [17, 18])
def test_bf16_with_slots_in_bf16_or_fp32_small_and_large(
    row_slots: list[int], emulated: bool, small: int, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adapters.processor.multiplies_bf16", lambda: not emulated)
    monkeypatch.setattr(fused_lora, "SMALL", small)
    a, b = ([each.bfloat16() for each in stack] for stack in stacks())
    x, y = draw(1, len(row_slots), INPUTS).bfloat16(), draw(2, len(row_slots), sum(WIDTHS)).bfloat16()
    wanted = expected(y, x, [each.float() for each in a], [each.float() for each in b], row_slots)
    got = added(y, x, a, b, row_slots)
    slots = fused_lora.fuse(a, b)[0].slots
    assert (got.dtype, slots.dtype, slots.small) == (torch.bfloat16, getattr(torch, dtype), small == RANK * INPUTS)
    torch.testing.assert_close(got.float(), wanted, atol=0.1, rtol=0.02)


def test_half_precision_goes_without_the_kernel() -> None:
    a, b = ([each.half() for each in stack] for stack in stacks())
    x, y = draw(1, 3, INPUTS).half(), draw(2, 3, sum(WIDTHS)).half()
    wanted = expected(y, x, [each.float() for each in a], [each.float() for each in b], [2, -1, 0])
    torch.testing.assert_close(added(y, x, a, b, [2, -1, 0]).float(), wanted, atol=0.05, rtol=0.01)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e38])
@pytest.mark.parametrize("matrix", ["a", "b"])
@pytest.mark.parametrize("row_slots", [[-1, 1, 0, 2, -1], [0, 2, -1, 2, 0], [1] * 50 + [0, -1]])
def test_an_adapter_that_overflows_stays_in_its_rows(bad: float, matrix: str, row_slots: list[int]) -> None:
    """Also one that lies in a slot between those of the batch, and has no row in it."""
    a, b = stacks()
    (a if matrix == "a" else b)[0][1] = bad
    slots = fused_lora.fuse(a, b)[0].slots
    for slot in range(SLOTS):
        slots.filled(slot)
    x, y = draw(1, len(row_slots), INPUTS), torch.zeros(len(row_slots), sum(WIDTHS))
    x[:, 0] = 1e3
    slots.add(AdapterRows.of(torch.tensor(row_slots)), y, x)
    assert (~y.isfinite()).any(1).tolist() == [slot == 1 for slot in row_slots]


def test_what_lies_beyond_an_adapters_rank_is_not_computed() -> None:
    """Whatever is zero in A and in B: a rank below the slot's, a slice or a whole layer that it leaves alone."""
    a, b = stacks()
    for each in (a[0][1, 0, 2], b[0][1, 0, :, 2], a[1][1], b[1][1], a[2][1, 0, :2], b[2][1, 0, :, :2]):
        each.zero_()
    x, y = draw(1, 4, INPUTS), draw(2, 4, sum(WIDTHS))
    wanted = expected(y, x, a, b, [1, 0, 1, -1])
    slots = fused_lora.fuse(a, b)[0].slots
    slots.filled(1)
    assert slots.ranks.tolist() == [[3, 3, 3], [2, 0, 3], [3, 3, 3], [3, 3, 3]]
    slots.add(AdapterRows.of(torch.tensor([1, 0, 1, -1])), y, x)
    torch.testing.assert_close(y, wanted, atol=1e-4, rtol=1e-4)


def test_a_slot_filled_anew_has_its_new_rank() -> None:
    slots = fused_lora.fuse(*stacks())[0].slots
    slots.b[1][2], slots.a[2] = 0, 0
    slots.filled(2)
    assert slots.ranks[2].tolist() == [3, 0, 3]
    slots.a[2, RANK] = torch.nan
    slots.filled(2)
    assert slots.ranks[2].tolist() == [3, 1, 3]


def test_vllms_tensors_are_views_and_nothing_is_stored_twice() -> None:
    a, b = stacks()
    fused_a, fused_b = fused_lora.fuse(a, b)
    for old, new in zip([*a, *b], [*fused_a, *fused_b], strict=True):
        assert new.shape == old.shape
        assert torch.equal(new, old)
    held = (fused_a.slots.a, *fused_a.slots.b)
    assert {pointer(each) for each in (*fused_a, *fused_b)} == {pointer(each) for each in held}
    assert sum(each.untyped_storage().nbytes() for each in held) == sum(each.nbytes for each in (*a, *b))


@pytest.mark.usefixtures("patched_vllm")
@pytest.mark.parametrize(
    ("kind", "outputs"),
    [("QKVParallelLinear", WIDTHS), ("MergedColumnParallelLinear", (4, 4)), ("RowParallelLinear", (5,))],
)
def test_vllms_own_layers_fill_and_clear_their_slots(kind: str, outputs: tuple[int, ...]) -> None:
    made = lora_layer(kind, INPUTS, outputs, RANK, wrapper([2, -1, 2]))
    assert isinstance(made.lora_a_stacked, fused_lora.Fused)
    a = [draw(number, RANK, INPUTS) for number in range(made.n_slices)]
    b = [draw(10 + number, made.lora_b_stacked[number].shape[2], RANK) for number in range(made.n_slices)]
    made.set_lora(2, *((a, b) if made.n_slices > 1 else (a[0], b[0])))
    x, y = draw(1, 3, INPUTS), torch.zeros(3, sum(made.output_slices))

    made.punica_wrapper.add_lora_linear(y, x, made.lora_a_stacked, made.lora_b_stacked, 1.0, made.output_slices)

    rows = [torch.cat([each_b @ each_a @ row for each_a, each_b in zip(a, b, strict=True)]) for row in x]
    torch.testing.assert_close(y, torch.stack([rows[0], torch.zeros_like(rows[1]), rows[2]]), atol=1e-4, rtol=1e-4)
    made.reset_lora(2)
    assert not any(each.any() for each in (made.lora_a_stacked.slots.a, *made.lora_a_stacked.slots.b))
