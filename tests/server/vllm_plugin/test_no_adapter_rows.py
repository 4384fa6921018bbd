"""The wrapper's methods against a loop over rows written by hand, for every pattern of slots."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.server.vllm_plugin.layers import SLOTS, wrapper

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.usefixtures("patched_vllm")

RANK, INPUTS = 4, 6
WIDTHS = (5, 2)  # the output slices of a fused layer such as qkv
SCALE = 0.5

slots = st.lists(st.integers(-1, SLOTS - 1), min_size=1, max_size=9)


def weights(*size: int) -> Any:
    return torch.randn(SLOTS, 1, *size, generator=torch.Generator().manual_seed(sum(size)))


def rows(count: int, width: int) -> Any:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(count))


@given(token_slots=slots, prefill=st.booleans())
@settings(max_examples=60, deadline=None)
def test_linear(token_slots: list[int], prefill: bool) -> None:
    a = tuple(weights(RANK, INPUTS) for _ in WIDTHS)
    b = tuple(weights(width, RANK) for width in WIDTHS)
    x, y = rows(len(token_slots), INPUTS), rows(len(token_slots), sum(WIDTHS))
    expected = y.clone()
    for row, slot in enumerate(token_slots):
        if slot >= 0:
            parts = [SCALE * b_i[slot, 0] @ a_i[slot, 0] @ x[row] for a_i, b_i in zip(a, b, strict=True)]
            expected[row] += torch.cat(parts)
    wrapper(token_slots, prefill=prefill).add_lora_linear(y, x, a, b, SCALE, WIDTHS)
    torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-4)


@given(token_slots=slots, prefill=st.booleans(), add=st.booleans())
@settings(max_examples=60, deadline=None)
def test_shrink_and_expand_called_apart(token_slots: list[int], prefill: bool, add: bool) -> None:
    """As the fully sharded layers do."""
    a, b = (weights(RANK, INPUTS),), (weights(WIDTHS[0], RANK),)
    x, y = rows(len(token_slots), INPUTS), rows(len(token_slots), 2 + WIDTHS[0])
    hidden, expected = (torch.zeros(len(token_slots), RANK),), y.clone()
    for row, slot in enumerate(token_slots):
        if slot >= 0:
            delta = SCALE * b[0][slot, 0] @ a[0][slot, 0] @ x[row]
            expected[row, 2:] = delta + (expected[row, 2:] if add else 0)
    made = wrapper(token_slots, prefill=prefill)
    made.add_shrink(hidden, x, a, SCALE)
    made.add_expand(y, hidden, b, (WIDTHS[0],), offset_start=2, add_inputs=add)
    torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-4)


@given(token_slots=slots, prefill=st.booleans())
@settings(max_examples=60, deadline=None)
def test_embedding(token_slots: list[int], prefill: bool) -> None:
    b = weights(7, RANK)
    x, y = rows(len(token_slots), RANK), rows(len(token_slots), 7)
    expected = y.clone()
    for row, slot in enumerate(token_slots):
        if slot >= 0:
            expected[row] += b[slot, 0] @ x[row]
    wrapper(token_slots, prefill=prefill).add_lora_embedding(y, x, b, add_inputs=True)
    torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-4)


@given(sampler_slots=slots)
@settings(max_examples=60, deadline=None)
def test_logits_follow_the_sampler_rows(sampler_slots: list[int]) -> None:
    a, b = weights(RANK, INPUTS), weights(11, RANK)
    x, y = rows(len(sampler_slots), INPUTS), rows(len(sampler_slots), 11)
    expected = y.clone()
    for row, slot in enumerate(sampler_slots):
        if slot >= 0:
            expected[row] += SCALE * b[slot, 0] @ a[slot, 0] @ x[row]
    tokens = [slot for slot in sampler_slots for _ in range(3)]  # three tokens of each request in this step
    wrapper(tokens, sampler_slots=sampler_slots).add_lora_logits(y, x, a, b, SCALE)
    torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-4)


def test_logits_of_prompt_rows_are_left_alone() -> None:
    x, y = rows(15, INPUTS), rows(15, 11)
    before = y.clone()
    wrapper([0, 1]).add_lora_logits(y, x, weights(RANK, INPUTS), weights(11, RANK), SCALE)
    assert torch.equal(y, before)


def test_nan_in_one_adapter_stays_in_its_rows() -> None:
    a, b = weights(RANK, INPUTS), weights(WIDTHS[0], RANK)
    b[1] = torch.nan
    y = torch.zeros(4, WIDTHS[0])
    wrapper([-1, 1, 0, -1]).add_lora_linear(y, rows(4, INPUTS), (a,), (b,), SCALE, (WIDTHS[0],))
    assert y.isnan().any(1).tolist() == [False, True, False, False]


def test_every_method_of_the_wrapper_is_known() -> None:
    """A method that is new may call the kernels with slot -1: read it, then list it here."""
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    replaced = {"update_metadata", "_apply_shrink", "_apply_expand", "add_lora_embedding", "add_lora_logits"}
    only_called_by_replaced = {"_shrink_prefill", "_shrink_decode", "_expand_prefill", "_expand_decode"}
    only_called_by_replaced |= {"_expand_slice_prefill", "_expand_slice_decode"}
    call_replaced_or_right = {"__init__", "add_shrink", "add_expand", "add_lora_linear", "apply_lora_full_linear"}
    found = {name for name, value in vars(PunicaWrapperCPU).items() if callable(value)}
    assert found == replaced | only_called_by_replaced | call_replaced_or_right


def test_full_linear_is_right_as_it_comes() -> None:
    weight, bias = weights(5, INPUTS), torch.zeros(SLOTS, 5)
    x, y = rows(3, INPUTS), rows(3, 5)
    expected = torch.stack([y[0], weight[1, 0] @ x[1], y[2]])
    enabled = torch.tensor([True, True, True])
    wrapper([-1, 1, -1]).apply_lora_full_linear(y, x, weight, bias, enabled)
    torch.testing.assert_close(y, expected)
