from pathlib import Path

import pytest
from pydantic import BaseModel

from adapters.train.cli import main
from adapters.train.config import TrainConfig, keys, load_config
from adapters.train.template import template


def test_every_key_is_in_it_with_its_docstring() -> None:
    text = template({})
    said = " ".join(text.replace("##", "").split())
    for section in TrainConfig.model_fields.values():
        assert isinstance(section.annotation, type)
        assert issubclass(section.annotation, BaseModel)
        for name, field in section.annotation.model_fields.items():
            assert f"# {name}:" in text
            assert " ".join((field.description or "").split()) in said
    for key in keys(TrainConfig):
        assert key.rpartition(".")[2] in text


@pytest.mark.parametrize("section", ["model", "quantization", "data", "training", "eval", "output"])
def test_every_key_has_a_docstring(section: str) -> None:
    kind = TrainConfig.model_fields[section].annotation
    assert isinstance(kind, type)
    assert issubclass(kind, BaseModel)
    assert [name for name, field in kind.model_fields.items() if not field.description] == []


def test_what_it_writes_loads_and_says_no_more_than_was_asked(tmp_path: Path, small_base: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("")
    path = tmp_path / "runs" / "sailor.yaml"
    assert main(["init", str(path), "--model", str(small_base), "--data", str(tmp_path / "rows.jsonl")]) == 0
    config = load_config(path)
    assert config.model.model_name_or_path == small_base
    assert [file.path.resolve() for file in config.data.train] == [tmp_path / "rows.jsonl"]
    assert config.output.name == "sailor"
    assert (config.peft, config.training) == (type(config.peft)(), type(config.training)())


def test_a_key_that_is_uncommented_is_read(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    assert main(["init", str(path), "--model", "base", "--data", "rows.jsonl"]) == 0
    text = path.read_text()
    for line in ("  # max_length: 512", "  # seed: 42", "  # r: 8"):
        assert text.count(line) == 1
        text = text.replace(line, line.replace("# ", "").replace("512", "77").replace("42", "7").replace("8", "4"))
    path.write_text(text)
    config = load_config(path)
    assert (config.data.max_length, config.training.seed, config.peft.r) == (77, 7, 4)


def test_a_file_that_is_there_is_kept_unless_it_is_forced(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("mine")
    command = ["init", str(path), "--model", "base", "--data", "rows.jsonl"]
    assert main(command) == 2
    assert path.read_text() == "mine"
    assert main([*command, "--force"]) == 0


def test_a_method_that_there_is_not_leaves_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.yaml"
    assert main(["init", str(path), "--model", "base", "--data", "rows.jsonl", "--method", "magic"]) == 2
    assert "peft.method" in capsys.readouterr().err
    assert not path.exists()
