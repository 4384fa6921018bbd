from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from adapters.errors import ConfigError
from adapters.train.aliases import ALIASES, LEFT_OUT
from adapters.train.config import TrainConfig, keys, load_config


def loaded(path: Path, *overrides: str, **flat: Any) -> tuple[TrainConfig, list[str]]:
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | flat))
    warnings: list[str] = []
    return load_config(path, overrides, warnings.append), warnings


def test_every_alias_means_a_key_that_there_is() -> None:
    assert set(ALIASES.values()) - set(keys(TrainConfig)) == set()
    assert set(ALIASES) & set(keys(TrainConfig)) == set()


def test_what_other_trainers_call_it_is_taken_with_a_warning(write_yaml: Callable[..., Path]) -> None:
    words = {"lora_r": 4, "cutoff_len": 99, "warmup_ratio": 0.1, "val_set_size": 0.5, "lora_target": "all"}
    path = write_yaml()
    values = yaml.safe_load(path.read_text())
    del values["data"]["eval_split"], values["training"]["per_device_train_batch_size"]
    path.write_text(yaml.safe_dump(values))
    config, warnings = loaded(path, micro_batch_size=3, **words)
    assert (config.peft.r, config.data.max_length, config.data.eval_split) == (4, 99, 0.5)
    assert (config.training.per_device_train_batch_size, config.training.warmup_steps) == (3, 0.1)
    assert config.peft.target_modules == "all-linear"
    assert len(warnings) == 6
    assert any("lora_r is peft.r here; taken as peft.r=4" in warning for warning in warnings)


def test_one_in_a_section_is_taken_too(write_yaml: Callable[..., Path]) -> None:
    config, warnings = loaded(write_yaml(peft={"lora_rank": 2}))
    assert config.peft.r == 2
    assert len(warnings) == 1


def test_a_key_of_ours_outside_of_its_section_is_taken(write_yaml: Callable[..., Path]) -> None:
    config, warnings = loaded(write_yaml(), lora_alpha=64)
    assert config.peft.lora_alpha == 64
    assert len(warnings) == 1


def test_words_that_transformers_took_back_and_those_that_say_nothing_here_stop_no_run(
    write_yaml: Callable[..., Path],
) -> None:
    """The arguments of scripts that fail on the transformers of today."""
    gone = {"logging_dir": "logs", "evaluation_strategy": "steps", "group_by_length": True, "fp16": True}
    config, warnings = loaded(
        write_yaml(training={"overwrite_output_dir": True}), "save_safetensors=true", torch_dtype="bf16", **gone
    )
    assert config.model.dtype == "bfloat16"
    assert config.training == loaded(write_yaml())[0].training
    assert len(warnings) == 7
    assert any("training.overwrite_output_dir is left out: an older result is replaced" in each for each in warnings)


def test_what_is_left_out_is_no_key_of_ours() -> None:
    ours = {key.rpartition(".")[2] for key in keys(TrainConfig)}
    assert set(LEFT_OUT) & (ours | set(ALIASES)) == set()


def test_two_words_for_one_key_are_an_error(write_yaml: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match=r"lora_r: it is peft\.r here, which is given, too"):
        loaded(write_yaml(peft={"r": 8}), lora_r=8)


def test_an_override_wins_over_another_word_in_the_file(write_yaml: Callable[..., Path]) -> None:
    config, warnings = loaded(write_yaml(), "lora_rank=2", "peft.lora_alpha=3", lora_r=8)
    assert (config.peft.r, config.peft.lora_alpha) == (2, 3)
    assert len(warnings) == 2


@pytest.mark.parametrize("words", [{"val_set_size": 500}, {"warmup_ratio": 30}])
def test_a_number_where_a_share_is_meant_is_an_error(write_yaml: Callable[..., Path], words: dict[str, int]) -> None:
    path = write_yaml()
    values = yaml.safe_load(path.read_text())
    del values["data"]["eval_split"]
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError, match="expected a share between 0 and 1"):
        loaded(path, **words)


def test_what_is_neither_ours_nor_an_alias_stays_an_error(write_yaml: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match="flash_attention: unknown key"):
        loaded(write_yaml(), flash_attention=True)
    with pytest.raises(ConfigError, match=r"peft\.seed: unknown key"):
        loaded(write_yaml(peft={"seed": 1}))


@pytest.mark.parametrize("text", ["yes", "007", "a: b", "", "[x"])
def test_text_is_taken_as_it_is_typed(write_yaml: Callable[..., Path], text: str) -> None:
    config, _ = loaded(write_yaml(), f"output.description={text}")
    assert config.output.description == text
