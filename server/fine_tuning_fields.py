"""What a client asks of a fine-tuning job, and what that means for the training configuration.

OpenAI's fields as its client sends them. Among the hyperparameters there may be keys of ours: those of the sections
`peft`, `training` and `data` of a training file, by their names there. It knows no jobs and no files.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from adapters.errors import ConfigError
from adapters.train.config import TrainConfig
from adapters.train.method_sections import PeftSection
from adapters.train.sections import DataSection, TrainingSection
from server.errors import BadRequest

Auto = Literal["auto"]
LEARNING_RATE = 2e-4
"""What `learning_rate_multiplier` multiplies."""
BATCH_SIZE = 4
FEW_ROWS, MANY_ROWS = 100, 25_000
"""With `n_epochs: auto`, so many rows at least and at most are seen, three times each in between."""
OWN_KEYS: Mapping[str, tuple[type[BaseModel], tuple[str, ...]]] = {
    "peft": (
        PeftSection,
        (
            *("method", "r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "use_dora"),
            *("init_lora_weights", "adalora"),
        ),
    ),
    "training": (
        TrainingSection,
        (
            *("max_steps", "gradient_accumulation_steps", "learning_rate", "lr_scheduler_type", "warmup_steps"),
            *("weight_decay", "max_grad_norm", "optim", "gradient_checkpointing"),
        ),
    ),
    "data": (DataSection, ("max_length", "packing", "train_on", "gates")),
}
"""Section → which of its keys a client may set. None of them is a path."""
UNION_PARTS = ("literal['auto']", "int", "float")
SUFFIX = re.compile(r"[A-Za-z0-9._-]{1,64}")


class Hyperparameters(BaseModel):
    """OpenAI's three; what else is given is looked up in `OWN_KEYS`."""

    model_config = ConfigDict(extra="allow", frozen=True)

    n_epochs: Auto | Annotated[int, Field(ge=1, le=1000)] = "auto"
    batch_size: Auto | Annotated[int, Field(ge=1, le=1024)] = "auto"
    learning_rate_multiplier: Auto | Annotated[float, Field(gt=0, le=1000)] = "auto"

    @property
    def own(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class Fields(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Supervised(Fields):
    hyperparameters: Hyperparameters = Hyperparameters()


class Method(Fields):
    type: Literal["supervised"]
    supervised: Supervised = Supervised()


class JobFields(Fields):
    """The JSON body of `POST /v1/fine_tuning/jobs`."""

    model: Annotated[str, Field(max_length=300)]
    training_file: Annotated[str, Field(max_length=64)]
    validation_file: Annotated[str, Field(max_length=64)] | None = None
    suffix: Annotated[str, Field(min_length=1, max_length=64, pattern=rf"^{SUFFIX.pattern}$")] | None = None
    seed: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None
    metadata: (
        Annotated[
            dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
        ]
        | None
    ) = None
    hyperparameters: Hyperparameters | None = None
    method: Method | None = None

    @property
    def wanted(self) -> Hyperparameters:
        """OpenAI has two places for them; what `method` says counts more."""
        older = {} if self.hyperparameters is None else self.hyperparameters.model_dump(exclude_unset=True)
        newer = {} if self.method is None else self.method.supervised.hyperparameters.model_dump(exclude_unset=True)
        return Hyperparameters(**{**older, **newer})


def read_job(body: Mapping[str, Any]) -> JobFields:
    """Raises BadRequest with the first field that is wrong, unknown, or of a kind of training that is not offered."""
    given = {key: value for key, value in body.items() if value is not None}
    if given.pop("integrations", None):
        raise _unsupported("integrations", "no other service is told of a job; leave integrations out")
    method = given.get("method")
    if isinstance(method, dict):
        kind = method.get("type")
        if kind in ("dpo", "reinforcement"):
            raise _unsupported("method.type", f"method.type is {kind!r}; only 'supervised' is offered")
    try:
        return JobFields.model_validate(given)
    except ValidationError as error:
        raise _first_of(error) from None


def _first_of(error: ValidationError) -> BadRequest:
    """What may be `auto` or a number is wrong in two ways; both are told."""
    found = [(_place(each["loc"]), each) for each in error.errors()]
    where, first = found[0]
    messages = " or ".join(dict.fromkeys(each["msg"] for place, each in found if place == where))
    expected = f"; expected some of {', '.join(JobFields.model_fields)}" * (first["type"] == "extra_forbidden")
    return BadRequest(f"{where}: {messages}{expected}", param=where)


def _place(location: Sequence[int | str]) -> str:
    """Without the names that pydantic gives to the parts of a union."""
    return ".".join(str(part) for part in location if part not in UNION_PARTS)[:120]


@dataclass(frozen=True)
class Resolved:
    """`auto` in numbers."""

    n_epochs: int
    batch_size: int
    learning_rate_multiplier: float


def resolve(wanted: Hyperparameters, rows: int) -> Resolved:
    """`rows`: of the training file."""
    few, many = rows * 3 < FEW_ROWS, rows * 3 > MANY_ROWS
    epochs = min(25, -(-FEW_ROWS // max(1, rows))) if few else max(1, MANY_ROWS // rows) if many else 3
    return Resolved(
        n_epochs=epochs if wanted.n_epochs == "auto" else wanted.n_epochs,
        batch_size=min(BATCH_SIZE, max(1, rows // 4)) if wanted.batch_size == "auto" else wanted.batch_size,
        learning_rate_multiplier=(
            1.0 if wanted.learning_rate_multiplier == "auto" else wanted.learning_rate_multiplier
        ),
    )


def configuration(
    wanted: Hyperparameters, resolved: Resolved, fixed: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """The sections of a training file. `fixed`: what the server decides, whatever the client wants."""
    sections: dict[str, dict[str, Any]] = {
        "training": {
            "num_train_epochs": resolved.n_epochs,
            "per_device_train_batch_size": resolved.batch_size,
            "learning_rate": LEARNING_RATE * resolved.learning_rate_multiplier,
        }
    }
    for key, value in wanted.own.items():
        sections.setdefault(_section_of(key), {})[key] = value
    for name, values in fixed.items():
        sections[name] = sections.get(name, {}) | dict(values)
    return sections


def require_configuration(sections: Mapping[str, Any]) -> None:
    """Raises BadRequest with all that is wrong."""
    try:
        TrainConfig.model_validate(sections)
    except ValidationError as error:
        raise BadRequest(
            "; ".join(map(_problem, error.errors())), param="hyperparameters", code="bad_hyperparameters"
        ) from None
    except ConfigError as error:
        raise BadRequest(error.message, param="hyperparameters", code="bad_hyperparameters") from None


def _problem(error: Mapping[str, Any]) -> str:
    if error["type"] == "value_error":  # of what does not go together: it says what it got, and the input is all of it
        return str(error["ctx"]["error"])
    return f"{error['loc'][-1]}: {error['msg']}, got {error['input']!r:.80}"


def _section_of(key: str) -> str:
    for section, (model, keys) in OWN_KEYS.items():
        if key in keys and key in model.model_fields:
            return section
    known = sorted(known_keys())
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
    raise BadRequest(
        f"hyperparameters.{key[:60]}: unknown; the nearest is {nearest}, and there are {', '.join(known)}",
        param=f"hyperparameters.{key[:60]}",
        code="bad_hyperparameters",
    )


def known_keys() -> Iterator[str]:
    yield from Hyperparameters.model_fields
    for model, keys in OWN_KEYS.values():
        yield from (key for key in keys if key in model.model_fields)


def _unsupported(param: str, message: str) -> BadRequest:
    return BadRequest(message, param=param, code="unsupported")
