"""AdaLoRA reallocates: the budget is the paper's, the ranks left add up, and R(P, Q) is no part of the loss."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.errors import ConfigError
from adapters.train import adalora, recipe
from adapters.train.config import load_config
from adapters.train.loop import backward
from adapters.train.method_sections import AdaLoraSection, PeftSection
from tests.adapters.train import tiny
from tests.adapters.train.tiny import attached, one_batch

MODULES = 14
SECTION = PeftSection(method="adalora", adalora=AdaLoraSection(init_r=6, target_r=3))


def budget(model: Any, step: int) -> int:
    """What PEFT's allocator leaves of all ranks together at `step`."""
    return int(model.base_model.rankallocator.budget_schedule(step)[0])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_base(tmp_path_factory.mktemp("tiny") / "base")


def test_the_budget_is_that_of_the_paper(base: Path) -> None:
    """b0 until t_i, bT from T - t_f on, and between them bT + (b0 - bT)·(1 - (t - t_i)/(T - t_i - t_f))³."""
    steps = 50
    model = attached(base, SECTION, steps=steps)
    first, last, tinit, tfinal = 6 * MODULES, 3 * MODULES, 5, 15
    for step in range(1, steps + 1):
        part = min(max((step - tinit) / (steps - tinit - tfinal), 0), 1)
        assert budget(model, step) == int(last + (first - last) * (1 - part) ** 3 + 1e-9), step


def test_the_ranks_left_after_each_reallocation_are_the_budget(base: Path) -> None:
    model = attached(base, SECTION, steps=20)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    left = []
    for step in range(1, 21):
        backward(model, [one_batch()])
        adalora.add_orthogonality(model)
        optimizer.step()
        adalora.reallocate(model, step)
        optimizer.zero_grad()
        if step > 2:  # tinit
            left.append(sum(adalora.kept_ranks(model).values()))
            assert left[-1] == budget(model, step), step
    assert left == sorted(left, reverse=True)
    assert left[-1] == 3 * MODULES
    assert len(set(adalora.kept_ranks(model).values())) > 1, "every module kept the same rank"


def test_the_ranks_left_are_those_that_matter_most(base: Path) -> None:
    """I = |w·dL/dw|, Ī its average, Ū that of |I - Ī|, s = Ī·Ū; S_i = s(λ_i) + mean s(P_i) + mean s(Q_i)."""
    model = attached(base, SECTION, steps=20)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2)
    average = {name: torch.zeros_like(p) for name, p in parameters.items()}
    spread = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for step in range(1, 9):
        backward(model, [one_batch()])
        optimizer.step()
        for name, p in parameters.items():
            importance = (p * p.grad).abs().detach()
            average[name] = 0.85 * average[name] + 0.15 * importance
            spread[name] = 0.85 * spread[name] + 0.15 * (importance - average[name]).abs()
        adalora.reallocate(model, step)
        optimizer.zero_grad()
    scores = {name: average[name] * spread[name] for name in parameters}
    triplets: dict[tuple[str, int], float] = {}
    for name in (name for name in parameters if ".lora_E" in name):
        rows, columns = name.replace("lora_E", "lora_A"), name.replace("lora_E", "lora_B")
        whole = scores[name].flatten() + scores[rows].mean(dim=1) + scores[columns].mean(dim=0)
        triplets |= {(name, number): float(score) for number, score in enumerate(whole)}
    best = sorted(triplets, key=lambda triplet: triplets[triplet], reverse=True)[: budget(model, 8)]
    left = {(name, number) for name, number in triplets if parameters[name][number] != 0}
    assert 3 * MODULES < len(left) < 6 * MODULES
    assert left == set(best)


def test_its_schedule_counts_the_steps_that_packing_leaves(write_yaml: Callable[..., Path]) -> None:
    fields = {"method": "adalora", "adalora": {"init_r": 6, "target_r": 3}}
    training = {"max_steps": None, "num_train_epochs": 15, "per_device_train_batch_size": 1}
    for packing, steps in ((False, 45), (True, 15)):
        config = load_config(write_yaml(peft=fields, training=training, data={"packing": packing, "max_length": 512}))
        setup = recipe.load(config, recipe.read_material(config))
        assert recipe.steps_of(config.training, setup.examples) == steps
        assert setup.model.peft_config["default"].total_step == steps


def test_what_is_saved_is_what_was_evaluated_also_where_a_run_ended_early(base: Path, tmp_path: Path) -> None:
    """Between two reallocations a masked value moves again; peft would save without it."""
    section = PeftSection(method="adalora", adalora=AdaLoraSection(init_r=6, target_r=3, deltaT=4))
    model = attached(base, section, steps=40)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(1, 11):
        backward(model, [one_batch()])
        optimizer.step()
        adalora.reallocate(model, step)
        optimizer.zero_grad()
    assert sum(adalora.kept_ranks(model).values()) > budget(model, 8)
    adalora.settle(model)
    assert sum(adalora.kept_ranks(model).values()) == budget(model, 8)


def test_orthogonality_is_in_the_gradient_and_not_in_the_loss(base: Path) -> None:
    model = attached(base, SECTION)
    loss = backward(model, [one_batch()])
    plain = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        pure = torch.nn.functional.cross_entropy(*flat(model))
    assert loss == pytest.approx(float(pure), abs=1e-5)
    adalora.add_orthogonality(model)
    for name, parameter in model.named_parameters():
        if ".lora_A" in name or ".lora_B" in name:
            p = parameter.detach() if ".lora_A" in name else parameter.detach().T
            off = p @ p.T - torch.eye(len(p))
            added = 0.5 * 2 * (off @ p) / off.norm() / (2 * MODULES)  # d‖PPᵀ - 1‖/dP, by hand
            added = added if ".lora_A" in name else added.T
            torch.testing.assert_close(parameter.grad - plain[name], added, atol=1e-6, rtol=1e-3)
        elif parameter.requires_grad:
            assert torch.equal(parameter.grad, plain[name])


def flat(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    batch = one_batch()
    logits = model(input_ids=batch.ids, attention_mask=batch.mask).logits[:, :-1]
    return logits.flatten(0, 1), batch.labels[:, 1:].flatten()


def test_accumulation_does_not_multiply_the_orthogonality_term(base: Path, tmp_path: Path) -> None:
    whole = tiny.run(base, tmp_path, SECTION, per_device_train_batch_size=8)
    parts = tiny.run(base, tmp_path, SECTION, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert parts.losses == pytest.approx(whole.losses, abs=2e-3)


def test_a_resumed_allocation_goes_on_as_if_nothing_had_been(base: Path) -> None:
    def advance(model: Any, first: int, last: int) -> None:
        for step in range(first, last):
            model.zero_grad()
            backward(model, [one_batch()])
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter -= 0.1 * parameter.grad
            adalora.reallocate(model, step)

    straight, resumed = attached(base, SECTION, steps=20), attached(base, SECTION, steps=20)
    advance(straight, 1, 9)
    resumed.load_state_dict(straight.state_dict(), strict=False)
    adalora.load_allocation_state(resumed, adalora.allocation_state(straight))
    advance(straight, 9, 21)
    advance(resumed, 9, 21)
    assert adalora.kept_ranks(straight) == adalora.kept_ranks(resumed)
    assert sum(adalora.kept_ranks(resumed).values()) == 3 * MODULES


def test_the_schedule_follows_the_length_of_the_run() -> None:
    assert AdaLoraSection().schedule(1000) == (100, 300, 60)
    assert AdaLoraSection(tinit=7, tfinal=0, deltaT=2).schedule(20) == (7, 0, 2)
    with pytest.raises(ValueError, match="at least 10 steps"):
        AdaLoraSection().schedule(9)


def test_a_run_that_is_too_short_is_a_configuration_error(base: Path) -> None:
    with pytest.raises(ConfigError, match=r"peft\.adalora: .*training\.max_steps"):
        attached(base, SECTION, steps=4)


def test_the_heat_map_is_a_picture(tmp_path: Path) -> None:
    ranks = {f"model.layers.{layer}.mlp.{kind}": layer + 1 for layer in range(3) for kind in ("up_proj", "down_proj")}
    adalora.draw_heat_map(ranks, tmp_path / "ranks.png")
    assert (tmp_path / "ranks.png").read_bytes().startswith(b"\x89PNG")
