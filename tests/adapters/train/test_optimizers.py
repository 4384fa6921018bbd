import bitsandbytes
import pytest
import torch

from adapters.errors import ConfigError
from adapters.train.optimizers import make_optimizer, resolved
from adapters.train.sections import TrainingSection


def optimizer(name: str, rate: float = 0.01) -> torch.optim.Optimizer:
    section = TrainingSection.model_validate({"optim": name, "learning_rate": rate, "weight_decay": 0.1})
    return make_optimizer([torch.nn.Parameter(torch.ones(64, 64))], section, quantized=True)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("auto", torch.optim.AdamW),
        ("adamw_torch", torch.optim.AdamW),
        ("adamw_8bit", bitsandbytes.optim.AdamW8bit),
        ("lion_8bit", bitsandbytes.optim.Lion8bit),
    ],
)
def test_each_name_is_its_optimizer_and_takes_a_step(name: str, kind: type[torch.optim.Optimizer]) -> None:
    made = optimizer(name)
    assert type(made) is kind
    (group,) = made.param_groups
    assert (group["lr"], group["weight_decay"]) == (0.01, 0.1)
    (parameter,) = group["params"]
    parameter.grad = torch.ones_like(parameter)
    made.step()
    # Each moves by the rate, against the sign of the gradient, after the weight has decayed by 0.1 of it.
    torch.testing.assert_close(parameter.detach(), torch.full((64, 64), 1 - 0.001 - 0.01), rtol=0, atol=1e-4)


def test_eight_bits_are_eight_bits() -> None:
    made = optimizer("adamw_8bit")
    (parameter,) = made.param_groups[0]["params"]
    parameter.grad = torch.ones_like(parameter)
    made.step()
    assert {made.state[parameter][name].dtype for name in ("state1", "state2")} == {torch.uint8}


def test_paging_without_a_gpu_is_refused_and_says_what_computes_the_same() -> None:
    with pytest.raises(ConfigError, match=r"training\.optim: paged_adamw_8bit .*GPU.* use adamw_8bit"):
        optimizer("paged_adamw_8bit")


@pytest.mark.parametrize(
    ("device", "quantized", "expected"),
    [("cpu", True, "adamw_torch"), ("cuda", True, "paged_adamw_8bit"), ("cuda", False, "adamw_torch")],
)
def test_auto_saves_memory_where_it_is_a_gpus_and_short(device: str, quantized: bool, expected: str) -> None:
    assert resolved("auto", device, quantized=quantized) == expected
