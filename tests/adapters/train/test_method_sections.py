from collections.abc import Callable
from pathlib import Path

import pytest

from adapters.errors import ConfigError
from adapters.train.config import load_config
from adapters.train.method_sections import PeftSection


@pytest.mark.parametrize(
    ("peft", "message"),
    [
        ({"method": "adalora", "r": 4}, "peft: method adalora does not look at r; it knows adalora, lora_alpha"),
        ({"adalora": {"init_r": 9}}, "peft: method lora does not look at adalora"),
        ({"method": "ia3", "use_dora": True}, "does not look at use_dora"),
        ({"method": "prompt", "target_modules": "mlp"}, "does not look at target_modules"),
        ({"method": "adalora", "adalora": {"init_r": 8, "target_r": 8}}, "init_r must be more than target_r"),
        ({"init_lora_weights": "pissa"}, "load_in_4bit=false or use loftq"),
        ({"init_lora_weights": "olora"}, "load_in_4bit=false or use loftq"),
        ({"init_lora_weights": "orthogonal", "r": 5}, "needs even ranks, got 5"),
        ({"init_lora_weights": "loftq", "use_dora": True}, "use_dora=true goes with the default"),
        ({"use_dora": True}, "use_dora=true learns the norms"),
        ({"r": 0}, r"peft\.r.*greater than or equal to 1, got 0"),
        ({"init_lora_weights": "corda"}, r"peft\.init_lora_weights: .*'loftq'.* got 'corda'"),
    ],
)
def test_what_cannot_be_says_why(write_yaml: Callable[..., Path], peft: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(write_yaml(peft=peft))


@pytest.mark.parametrize(
    ("peft", "message"),
    [
        ({"init_lora_weights": "pissa"}, "set model.dtype=float32, got auto"),
        ({"init_lora_weights": "loftq"}, "needs quantization.load_in_4bit=true"),
        ({"method": "qlora"}, "it is `lora`"),
    ],
)
def test_what_goes_with_a_quantised_base_only_or_never(
    write_yaml: Callable[..., Path], peft: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(write_yaml(peft=peft, quantization={"load_in_4bit": False}))


@pytest.mark.parametrize(
    ("section", "parameters", "rank", "alpha"),
    [
        (PeftSection(r="auto"), 135e6, 8, 16),
        (PeftSection(r="auto"), 8e9, 16, 32),
        (PeftSection(r="auto"), 70e9, 32, 64),
        (PeftSection(r=4), 70e9, 4, 8),
        (PeftSection(r=64, use_rslora=True), 135e6, 64, 16),
        (PeftSection(r=8, lora_alpha=3), 135e6, 8, 3),
    ],
)
def test_auto_goes_by_the_bases_size(section: PeftSection, parameters: float, rank: int, alpha: int) -> None:
    resolved = section.resolved(int(parameters))
    assert (resolved.r, resolved.lora_alpha) == (rank, alpha)
    assert PeftSection.model_validate(resolved.model_dump()) == resolved
