"""Every method: its seeded run, its gradients computed in another way, and what is served against what was trained."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.base import BaseModel
from adapters.convert import convert
from adapters.errors import NotServable
from adapters.nf4 import reference_dequantize
from adapters.train import adalora, loop, methods
from adapters.train.evaluate import held_out_loss
from adapters.train.handover import check_servable
from adapters.train.method_sections import PeftSection
from adapters.validate import validate
from tests.adapters.train import tiny
from tests.adapters.train.servable import SERVABLE, SMALL
from tests.adapters.train.tiny import NF4, PLAIN, attached, base_of, log_probabilities, one_batch

OTHERS: dict[str, tuple[dict[str, Any], bool]] = {
    "dora": (SMALL | {"use_dora": True}, False),
    "ia3": ({"method": "ia3"}, True),
    "prompt": ({"method": "prompt", "num_virtual_tokens": 4}, True),
    "prefix": ({"method": "prefix", "num_virtual_tokens": 4}, True),
}
BASES = {True: NF4, False: PLAIN}
"""By whether it is in NF4."""
PINNED: dict[str, tuple[float, float]] = {
    "lora": (5.540, 1.943),
    "qlora": (5.564, 1.985),
    "rslora with patterns": (5.564, 1.598),
    "gaussian": (5.564, 1.498),
    "orthogonal": (5.564, 1.591),
    "loftq": (5.547, 1.953),
    "pissa": (5.540, 1.995),
    "olora": (5.540, 1.874),
    "adalora": (5.540, 4.684),
    "adalora on nf4": (5.564, 4.641),
    "dora": (5.540, 1.848),
    "ia3": (5.564, 4.493),
    "prompt": (5.288, 5.020),
    "prefix": (5.320, 4.999),
}
"""Of the first step and of the last."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_base(tmp_path_factory.mktemp("tiny") / "base")


def run(case: str, base: Path, scratch: Path, **training: Any) -> tiny.Run:
    fields, on_nf4 = (SERVABLE | OTHERS)[case]
    return tiny.run(base, scratch, PeftSection.model_validate(fields), BASES[on_nf4], **training)


def saved(adapted: Any, directory: Path) -> Path:
    methods.save(adapted, "tiny", directory)
    return directory


@pytest.mark.parametrize("case", SERVABLE | OTHERS)
def test_the_losses_of_the_seeded_run_are_pinned(base: Path, tmp_path: Path, case: str) -> None:
    losses = run(case, base, tmp_path).losses
    assert (losses[0], losses[-1]) == pytest.approx(PINNED[case], abs=0.02)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("case", SERVABLE)
def test_what_is_served_computes_what_peft_trained(base: Path, tmp_path: Path, case: str) -> None:
    """A fresh base with the plain LoRA that the server would hold, in fp32."""
    from peft import PeftModel

    trained = run(case, base, tmp_path).model
    expected = log_probabilities(trained)
    directory, served = saved(trained, tmp_path / "a"), BaseModel.read(base)
    verdict = convert(directory, served, 16)
    manifest = validate(directory, served, 16, verdict)
    assert manifest.verdict == (
        f"converted exactly from {manifest.conversion['from']}" if manifest.conversion else "served as it came"
    )
    fresh = base_of(base, BASES[SERVABLE[case][1]])
    untouched = log_probabilities(fresh)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # AdaLoRA may leave nothing of a module, which peft then misses
        got = log_probabilities(PeftModel.from_pretrained(fresh, str(directory)))
    assert (got - expected).abs().max() < 1e-4
    assert (expected - untouched).abs().max() > 0.1


@pytest.mark.parametrize(("init", "grows"), [("loftq", False), ("pissa", True), ("olora", True)])
def test_an_initialisation_from_the_base_keeps_or_nears_what_the_base_computes(
    base: Path, init: str, grows: bool
) -> None:
    """PiSSA and OLoRA move a part of it into the adapter; LoftQ brings NF4 nearer to the checkpoint."""
    exact = log_probabilities(base_of(base, PLAIN))
    quantization = PLAIN if grows else NF4
    adapted = attached(base, PeftSection.model_validate(SMALL | {"init_lora_weights": init}), quantization)
    assert (log_probabilities(adapted) - exact).abs().mean() < (
        1e-5 if grows else 0.97 * (log_probabilities(base_of(base)) - exact).abs().mean()
    )


@pytest.mark.parametrize("case", ["qlora", "pissa", "ia3", "prompt", "prefix"])
def test_the_base_is_evaluated_as_it_is_also_after_training(base: Path, tmp_path: Path, case: str) -> None:
    trained = run(case, base, tmp_path).model
    rows = tiny.examples()
    fresh = attached(base, PeftSection.model_validate(SMALL), BASES[(SERVABLE | OTHERS)[case][1]])
    adapter = held_out_loss(trained, rows, 0, 4)
    assert held_out_loss(trained, rows, 0, 4, base=True) == pytest.approx(
        held_out_loss(fresh, rows, 0, 4, base=True), abs=1e-4
    )
    assert held_out_loss(trained, rows, 0, 4) == pytest.approx(adapter, abs=1e-6)
    assert adapter < held_out_loss(fresh, rows, 0, 4, base=True)


@pytest.mark.parametrize("case", OTHERS)
def test_what_no_request_could_ask_for_says_so_and_is_kept(base: Path, tmp_path: Path, case: str) -> None:
    directory = saved(run(case, base, tmp_path, max_steps=2).model, tmp_path / "a")
    before = {file.name: file.read_bytes() for file in directory.iterdir()}
    with pytest.raises(NotServable, match=r"not served beside it|puts vectors before the prompt"):
        check_servable(directory, base, 16)
    assert {file.name: file.read_bytes() for file in directory.iterdir()} == before


def test_an_error_that_was_accepted_is_stated(base: Path, tmp_path: Path) -> None:
    directory = saved(run("dora", base, tmp_path).model, tmp_path / "a")
    assert "off by" in check_servable(directory, base, 16, max_error=0.9).verdict
    # of full rank a LoRA is what DoRA is, and then nothing is left that is off
    assert check_servable(directory, base, 64).verdict == "converted exactly from dora"


@pytest.mark.parametrize("case", ["qlora", "adalora on nf4"])
def test_the_gradient_of_a_step_is_the_one_of_the_dense_weights(base: Path, case: str) -> None:
    """G = dL/dW of a plain llama whose weights are NF4(W) + ΔW, without peft or bitsandbytes; then the chain rule."""
    fields, on_nf4 = SERVABLE[case]
    adapted = attached(base, PeftSection.model_validate(fields), BASES[on_nf4])
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    loop.backward(adapted, [one_batch()])

    dense = base_of(base, PLAIN)
    layers = {
        name.removeprefix("base_model.model."): layer
        for name, layer in adapted.named_modules()
        if hasattr(layer, "lora_A") and "default" in layer.lora_A
    }
    assert len(layers) == 14
    for name, layer in layers.items():
        weight = dense.get_submodule(name).weight
        weight.requires_grad_(True)
        weight.data = plain_weight(layer.get_base_layer().weight) + change(layer)
    loop.backward(dense, [one_batch()])
    for name, layer in layers.items():
        a, b, e, scale = factors(layer)
        dense_gradient = scale * dense.get_submodule(name).weight.grad
        assert_near(b.grad, dense_gradient @ (e * a).T)
        assert_near(a.grad, e * (b.T @ dense_gradient))
        if e.requires_grad:
            assert_near(e.grad, ((b.T @ dense_gradient) * a).sum(dim=1, keepdim=True))


def factors(layer: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
    """A, B, E and the scaling; a LoRA's E is one."""
    if hasattr(layer, "lora_E"):
        scale = layer.scaling["default"] / (6 + 1e-5)
        return layer.lora_A["default"], layer.lora_B["default"], layer.lora_E["default"], scale
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return a, b, torch.ones(a.shape[0], 1), layer.scaling["default"]


def change(layer: Any) -> torch.Tensor:
    a, b, e, scale = factors(layer)
    return (scale * b @ (e * a)).detach()


def plain_weight(packed: Any) -> torch.Tensor:
    from bitsandbytes import functional

    state = packed.quant_state
    absmax = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    return reference_dequantize(packed.data, absmax, state.code, state.blocksize, state.shape, torch.float32)


def assert_near(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert (got - expected).norm() < 1e-4 * expected.norm()


def test_a_copy_is_checked_not_the_adapter_itself(base: Path, tmp_path: Path) -> None:
    directory = saved(run("pissa", base, tmp_path, max_steps=2).model, tmp_path / "a")
    before = {file.name: file.read_bytes() for file in directory.iterdir()}
    assert check_servable(directory, base, 16).verdict == "converted exactly from pissa"
    assert {file.name: file.read_bytes() for file in directory.iterdir()} == before
    with pytest.raises(NotServable, match="max_error="):
        check_servable(directory, base, 4)


def test_the_adapter_is_fp32_whatever_the_base(base: Path) -> None:
    adapted = attached(base, PeftSection.model_validate(SMALL | {"init_lora_weights": "orthogonal"}))
    assert {p.dtype for p in adapted.parameters() if p.requires_grad} == {torch.float32}
    assert not adalora.is_adalora(adapted)
