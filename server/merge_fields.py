"""The JSON bodies of `POST /v1/merges` and `POST /v1/exports`, checked without looking at any adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from adapters.merge.bases import Asked
from adapters.merge.combine import Method, SignMethod
from adapters.merge.export.exporting import TYPES, Format
from adapters.merge.orders import Proof
from adapters.merge.plan import Dtype
from server.errors import BadRequest

Fields = TypeVar("Fields", bound=BaseModel)
OutType = Literal["bf16", "f16", "f32", "q8_0", "nf4"]
Reference = Field(min_length=1, max_length=400)


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Budget(_Frozen):
    """How far a merge may be from its adapter, in nats per token, by default as adapters/merge/report.py says; and on
    what it is measured."""

    max_kl: float | None = Field(default=None, gt=0)
    max_loss_increase: float | None = Field(default=None, gt=0)
    accept_loss: bool = False
    """Take it however far it is."""
    validation_file: str | None = Field(default=None, max_length=100)
    """The id of a file of rows of the task, on which it is measured; without one, on chats of this package."""

    def proof(self, tokens: int, data: tuple[str, ...] = ()) -> Proof:
        return Proof(self.max_kl, self.max_loss_increase, self.accept_loss, tokens=tokens, data=data)


class Part(_Frozen):
    model: str = Reference
    weight: float = 1.0


class Into(_Frozen):
    """The adapter that several ones become."""

    name: str
    promote: bool = False
    description: str | None = None
    tags: dict[str, str] = {}


class MergeFields(Budget):
    """One `adapter` into its base, or several `adapters` into one new adapter."""

    adapter: str | None = Field(default=None, min_length=1, max_length=400)
    adapters: tuple[Part, ...] = Field(default=(), max_length=16)
    into: Into | None = None
    base: Asked = "auto"
    dtype: Dtype = "bfloat16"
    method: Method = "svd"
    density: float | None = Field(default=None, gt=0, le=1)
    majority_sign_method: SignMethod = "total"
    svd_rank: int | None = Field(default=None, ge=1)
    seed: int = Field(default=0, ge=0, lt=1 << 32)

    @model_validator(mode="after")
    def _one_or_several(self) -> Self:
        if (self.adapter is None) == (not self.adapters):
            raise ValueError("expected either `adapter`, which is merged into its base, or several `adapters`")
        several = self.model_fields_set & {"into", "method", "density", "majority_sign_method", "svd_rank", "seed"}
        if self.adapter is not None and several:
            raise ValueError(f"{sorted(several)[0]} is for several `adapters`")
        if self.adapters and (len(self.adapters) < 2 or self.into is None):
            raise ValueError("several `adapters` are two or more, and become the adapter that `into.name` names")
        alone = self.model_fields_set & {"base", "dtype", *Budget.model_fields}
        if self.adapters and alone:
            raise ValueError(f"{sorted(alone)[0]} is for one `adapter` that is merged into its base")
        return self


class ExportFields(Budget):
    adapter: str = Reference
    format: Format
    outtype: OutType | None = None
    base: Asked = "auto"
    accept_differences: bool = False
    """Take it although llama.cpp cuts texts or renders chats otherwise than the model's own tokenizer and template."""

    @model_validator(mode="after")
    def _format_has_it(self) -> Self:
        if self.outtype is not None and self.outtype not in TYPES[self.format]:
            offered = ", ".join(TYPES[self.format])
            raise ValueError(f"outtype is {self.outtype!r}, {self.format} has {offered}")
        if self.format == "gguf-lora" and self.model_fields_set & {"base", *Budget.model_fields}:
            raise ValueError("gguf-lora is the adapter alone, which is merged into nothing: leave out base and budget")
        if "accept_differences" in self.model_fields_set and not self.format.startswith("gguf"):
            raise ValueError(
                f"accept_differences is for gguf and gguf-lora; {self.format} has the model's own tokenizer"
            )
        return self

    def proof(self, tokens: int, data: tuple[str, ...] = ()) -> Proof:
        return replace(super().proof(tokens, data), accept_differences=self.accept_differences)

    @property
    def stored(self) -> str:
        return self.outtype or TYPES[self.format][0]


OUTTYPE_OF: Mapping[Dtype, OutType] = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}
SHARED = {"adapter", "base", *Budget.model_fields}
"""Fields of a merge of one adapter that are an export's, too."""


def read_body(raw: Mapping[str, Any], model: type[Fields]) -> Fields:
    """Raises BadRequest with the first field that is wrong or unknown."""
    try:
        return model.model_validate(dict(raw))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])[:80]
        expected = f"; expected some of {', '.join(model.model_fields)}" * (first["type"] == "extra_forbidden")
        message = first["msg"].removeprefix("Value error, ")
        raise BadRequest(f"{where}: {message}{expected}" if where else message, param=where or None) from None
