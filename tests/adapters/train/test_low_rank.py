from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.checkpoint import checkpoint

from adapters.train.low_rank import use_low_rank_products

WIDTH = 64


class Layer(torch.nn.Module):  # type: ignore[misc]
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(WIDTH, 2 * WIDTH, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


def lora(dtype: torch.dtype = torch.float32, **keys: Any) -> Any:
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["linear"], r=4, lora_alpha=12, init_lora_weights=False, **keys)
    return get_peft_model(Layer(dtype), config)


def outcome(model: Any, x: torch.Tensor, *, checkpointed: bool = False) -> list[torch.Tensor]:
    """What comes out, and the gradients of input, A and B."""
    torch.manual_seed(1)
    x = x.clone().requires_grad_()
    out = checkpoint(model, x, use_reentrant=False) if checkpointed else model(x)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [out, *torch.autograd.grad((out.float() ** 2).sum(), [x, *parameters])]


@pytest.mark.parametrize("keys", [{}, {"use_rslora": True}, {"lora_dropout": 0.5}], ids=str)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_output_and_gradients_are_pefts(keys: dict[str, Any], checkpointed: bool) -> None:
    x, model = torch.randn(3, 5, WIDTH), lora(**keys)
    expected = outcome(model, x)
    assert use_low_rank_products(model) == 1
    for found, wanted in zip(outcome(model, x, checkpointed=checkpointed), expected, strict=True):
        assert (found - wanted).norm() < 1e-6 * wanted.norm()


def test_in_bf16_it_is_as_near_as_bf16_is() -> None:
    x, model = torch.randn(3, 5, WIDTH, dtype=torch.bfloat16), lora(torch.bfloat16)
    expected = outcome(model, x)
    use_low_rank_products(model)
    found = outcome(model, x)
    assert [tensor.dtype for tensor in found] == [tensor.dtype for tensor in expected]
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() < 0.01 * other.norm()


def test_what_is_kept_until_the_backward_pass_is_in_the_type_of_the_input() -> None:
    model = lora(torch.bfloat16)
    use_low_rank_products(model)
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(torch.randn(30, WIDTH, dtype=torch.bfloat16, requires_grad=True))
    assert {tensor.dtype for tensor in kept if len(tensor) == 30} == {torch.bfloat16}


def test_with_the_adapter_off_it_is_the_base() -> None:
    x, model = torch.randn(5, WIDTH), lora()
    expected = model.get_base_model().linear.base_layer(x)
    use_low_rank_products(model)
    with model.disable_adapter():
        assert torch.equal(model(x), expected)


def test_another_kind_of_lora_keeps_its_own_forward() -> None:
    assert use_low_rank_products(lora(use_dora=True)) == 0
