"""The configuration of one training run: a YAML file plus `--set a.b=c`, checked before anything is loaded.

Unknown keys are errors that name the nearest key. It knows nothing of torch; a configuration can be checked on a
machine that could not train it. The keys themselves stand in `sections.py`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError, model_validator

from adapters.errors import ConfigError
from adapters.train.aliases import left_out, own, own_key
from adapters.train.method_sections import PeftSection, impossible
from adapters.train.sections import (
    DataFile,
    DataSection,
    EvalSection,
    ModelSection,
    OutputSection,
    QuantizationSection,
    Section,
    TrainingSection,
)


class TrainConfig(Section):
    model: ModelSection
    quantization: QuantizationSection = QuantizationSection()
    peft: PeftSection = PeftSection()
    data: DataSection
    training: TrainingSection
    eval: EvalSection = EvalSection()
    output: OutputSection

    @model_validator(mode="after")
    def _goes_together(self) -> TrainConfig:
        problems = list(impossible(self.model, self.quantization, self.peft, self.training, self.data))
        if problems:
            raise ValueError("; ".join(problems))
        return self


def ignore(warning: str) -> None: ...


def load_config(path: Path, overrides: Sequence[str] = (), warn: Callable[[str], None] = ignore) -> TrainConfig:
    """Read, override, check; raises ConfigError with one line for each thing that is wrong."""
    checked = _checked(_read_yaml(path), overrides, str(path), warn)
    placed: TrainConfig = with_files(checked, path.parent.joinpath)
    return placed


def config_of_model(model: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Defaults for what is said of a base alone: there is nothing to train on."""
    values: dict[str, Any] = {"model": {"model_name_or_path": str(model)}, "data": {"train": ["nothing"]}}
    values |= {"training": {"max_steps": 1}, "output": {"output_dir": "nowhere", "name": "nothing"}}
    return _checked(values, overrides, "--set")


def _checked(
    values: dict[str, Any], overrides: Sequence[str], source: str, warn: Callable[[str], None] = ignore
) -> TrainConfig:
    values, warnings = own(values, frozenset(keys(TrainConfig)))
    for override in overrides:
        warnings += _apply(values, override)
    for warning in warnings:
        warn(f"{source}: {warning}")
    try:
        return TrainConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{source}: {line}" for line in _explain(error))) from None


def with_files(value: Any, where: Callable[[Path], Path]) -> Any:
    """The same section, the path of every data file in it put through `where`."""
    if isinstance(value, DataFile):
        return value.model_copy(update={"path": where(value.path)})
    if isinstance(value, tuple):
        return tuple(with_files(part, where) for part in value)
    if isinstance(value, Section):
        parts = {name: getattr(value, name) for name in type(value).model_fields}
        moved = {name: with_files(part, where) for name, part in parts.items()}
        return value.model_copy(update={name: part for name, part in moved.items() if part != parts[name]})
    return value


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected sections (model, data, training, output), got {type(values).__name__}")
    return values


def _apply(values: dict[str, Any], override: str) -> list[str]:
    """What to warn of."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {override}: expected section.key=value, as in training.learning_rate=1e-4")
    known = frozenset(keys(TrainConfig))
    if needless := left_out(key, known):
        return [needless]
    try:
        value = text if _is_text(key) else yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: the value cannot be read as YAML: {error}") from error
    target, value, warning = own_key(key, value, known)
    *sections, last = target.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ConfigError(f"--set {override}: {section} is a value, not a section")
    values[last] = value
    return [warning] if warning else []


def _is_text(key: str) -> bool:
    """Whether a key takes any text: `yes`, `007` and `3: 4` are taken as they are typed."""
    section: Any = TrainConfig
    for part in key.split("."):
        if not (isinstance(section, type) and issubclass(section, BaseModel) and part in section.model_fields):
            return False
        section = section.model_fields[part].annotation
    return section is str


def _explain(error: ValidationError) -> Iterator[str]:
    known = list(keys(TrainConfig))
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
            yield f"{key}: unknown key; the nearest is {nearest}"
        elif problem["type"] == "value_error":  # of a validator of ours, which says what it got
            yield f"{key}: {problem['ctx']['error']}" if key else str(problem["ctx"]["error"])
        else:
            yield f"{key}: {problem['msg']}, got {problem['input']!r}"


def keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield prefix + name
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from keys(kind, f"{prefix}{name}.")
