from collections.abc import Callable
from importlib.resources import as_file, files
from pathlib import Path

import pytest

from adapters.errors import ConfigError
from adapters.train.config import load_config
from adapters.train.reading import read_files

SHIPPED = ("pirate", "records", "ticket")


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_yaml_loads_and_its_prompts_are_not_in_its_data(name: str) -> None:
    with as_file(files("adapters.train") / "demo" / f"{name}.yaml") as path:
        config = load_config(path)
        conversations = read_files(config.data.train).conversations
    asked = {conversation.messages[-2]["content"] for conversation in conversations}
    assert len(asked) == len(conversations) >= 60
    assert not asked & set(config.eval.prompts)


def test_no_shipped_yaml_is_forgotten_here() -> None:
    shipped = {entry.name for entry in (files("adapters.train") / "demo").iterdir() if entry.name.endswith(".yaml")}
    assert shipped == {f"{name}.yaml" for name in SHIPPED}


def test_an_unknown_key_is_an_error_that_names_the_nearest(write_yaml: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match=r"training\.learing_rate: unknown key.* training\.learning_rate"):
        load_config(write_yaml(training={"learing_rate": 1}))


def test_an_override_is_typed_and_wins_over_the_file(write_yaml: Callable[..., Path]) -> None:
    config = load_config(write_yaml(), ["training.learning_rate=1e-4", "peft.target_modules=[q_proj]", "peft.r=4"])
    assert (config.training.learning_rate, config.peft.target_modules, config.peft.r) == (1e-4, ("q_proj",), 4)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.max_steps=many", "training.max_steps: .*integer.* got 'many'"),
        ("training.max_steps", "expected section.key=value"),
        ("model.model_name_or_path.x=1", "is a value, not a section"),
        ("peft.r=[", "cannot be read as YAML"),
        ("output.name=a/b", "output.name: .*pattern"),
    ],
)
def test_a_bad_override_says_what_is_wrong(write_yaml: Callable[..., Path], override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(write_yaml(), [override])


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml: cannot be read"):
        load_config(tmp_path / "absent.yaml")
