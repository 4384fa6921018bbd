"""What is wrong with them is what is said, and nothing else."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from loadtests.rivals.wrong_merges import nf4_once, tensors_of

ORIGINAL, PACKED, CHANGE = torch.tensor([1.0, 2.0]), torch.tensor([1.5, 1.5]), torch.tensor([0.25, -0.25])


def test_the_change_is_added_to_the_wrong_values() -> None:
    bases = {"original": ORIGINAL, "dequantized": PACKED}
    weights: Any = SimpleNamespace(base=lambda which: {"w": bases[which]}, merged=lambda which: {"w": PACKED + CHANGE})
    found = tensors_of(weights, lambda name, tensor: 10 * tensor)["w"]
    assert found.tolist() == [10.25, 19.75]


def test_scales_that_are_not_quantised_keep_the_largest_of_every_block() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16).float()
    found = nf4_once(weight)
    places = weight.abs().argmax(dim=1, keepdim=True)
    positive = weight.gather(1, places) > 0
    assert torch.equal(found.gather(1, places)[positive], weight.gather(1, places)[positive])
    assert not torch.equal(found, weight)
