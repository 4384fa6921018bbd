import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapters.base import BaseModel
from adapters.errors import ConfigError
from adapters.train.config import TrainConfig, load_config
from adapters.train.journal import Step
from adapters.train.recipe import train
from adapters.validate import validate


@pytest.fixture
def trained(config: TrainConfig) -> Any:
    return train(config)


def test_the_result_is_a_whole_directory_that_any_user_can_read(trained: Any, config: TrainConfig) -> None:
    names = {path.name for path in config.output.output_dir.iterdir()}
    expected = "adapter_config.json adapter_model.safetensors loraplex.json README.md loss.png log.jsonl held_out.jsonl"
    assert names == set(expected.split())
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in config.output.output_dir.iterdir())
    assert [path.name for path in config.output.output_dir.parent.iterdir() if path.name.startswith(".out")] == []


def test_the_losses_of_the_seeded_run_are_pinned(trained: Any) -> None:
    assert [step.loss for step in trained.steps] == pytest.approx([10.811, 10.869, 10.656, 10.525], abs=0.02)
    assert trained.verdict.held_out_adapter < trained.verdict.held_out_base


def test_the_gate_takes_it_and_finds_where_it_comes_from(trained: Any, config: TrainConfig, small_base: Path) -> None:
    manifest = validate(trained.directory, BaseModel.read(small_base), max_rank=16)
    assert manifest.base_fingerprint == BaseModel.read(small_base).fingerprint
    assert manifest.lineage["seed"] == 42
    assert manifest.lineage["quantization"]["bnb_4bit_quant_type"] == "nf4"
    assert set(manifest.scores) == {"held_out_loss", "held_out_loss_base"}


def test_nothing_it_writes_names_a_directory_of_this_machine(trained: Any, small_base: Path) -> None:
    for name in ("adapter_config.json", "loraplex.json", "README.md"):
        assert str(small_base.parent) not in (trained.directory / name).read_text()


def test_the_log_has_a_line_a_step_and_a_line_a_look_at_the_held_out_loss(trained: Any) -> None:
    lines = [json.loads(line) for line in (trained.directory / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    looks = {line["step"]: line["held_out_loss"] for line in lines if "held_out_loss" in line}
    assert list(looks) == [0, 1, 2, 3, 4]
    assert looks[0] == trained.verdict.held_out_base
    assert min(looks.values()) == trained.verdict.held_out_adapter


def test_who_watches_hears_of_every_step_and_can_end_the_run(config: TrainConfig) -> None:
    class Enough(Exception):
        pass

    heard: list[tuple[int, int]] = []

    def watch(step: Step, total: int) -> None:
        heard.append((step.step, total))
        if step.step == 2:
            raise Enough

    with pytest.raises(Enough):
        train(config, watch)
    assert heard == [(1, 4), (2, 4)]
    assert not config.output.output_dir.exists()


def test_three_steps_on_the_demo_base_change_what_peft_loads(demo_base: Path, tmp_path: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    shipped = Path(__file__).parents[3] / "adapters" / "train" / "demo" / "pirate.yaml"
    overrides = [f"model.model_name_or_path={demo_base}", f"output.output_dir={tmp_path / 'pirate'}"]
    overrides += ["training.max_steps=3", "training.warmup_steps=0", "eval.prompts=[]"]
    result = train(load_config(shipped, overrides))
    assert result.steps[-1].loss < result.steps[0].loss

    base = AutoModelForCausalLM.from_pretrained(demo_base, dtype=torch.float32)
    ids = torch.tensor([[1, 9690, 198, 2683]])
    with torch.no_grad():
        before = base(ids).logits
        after = PeftModel.from_pretrained(base, str(result.directory))(ids).logits
    assert (after - before).abs().max() > 0.1


def test_an_adapter_is_trained_further(trained: Any, write_yaml: Callable[..., Path], tmp_path: Path) -> None:
    model = {"adapter_name_or_path": str(trained.directory)}
    output = {"output_dir": str(tmp_path / "again")}
    again = train(load_config(write_yaml(model=model, output=output)))
    assert again.steps[0].loss < trained.steps[0].loss - 0.1
    with pytest.raises(ConfigError, match=r"lora_A.weight is \(8, 128\), expected \(2, 128\)"):
        train(load_config(write_yaml(model=model, output=output, peft={"r": 2})))
