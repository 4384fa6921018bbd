"""What may stand beside the files of an upload, or beside `source`: one model for the form and the JSON body."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from adapters.upload import UploadOptions
from server.errors import BadRequest

Fields = TypeVar("Fields", bound="UploadFields")


class UploadFields(BaseModel):
    """A field here is one of both; text is read as the type that it must have."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = ""
    description: str | None = None
    promote: bool = True
    sha256: str | dict[str, str] | None = None
    tags: dict[str, str] = {}
    lineage: dict[str, Any] = {}
    max_error: float = Field(default=0.0, ge=0, le=1)

    @field_validator("sha256", "tags", "lineage", mode="before")
    @classmethod
    def _object_in_a_form(cls, given: Any) -> Any:
        try:
            return json.loads(given) if isinstance(given, str) and given.lstrip().startswith("{") else given
        except RecursionError:
            raise ValueError("it is nested too deeply") from None

    def options(self, by: str | None) -> UploadOptions:
        return UploadOptions(by=by, **self.model_dump(include=set(UploadFields.model_fields) - {"name"}))


def read_fields(raw: Mapping[str, Any], model: type[Fields]) -> Fields:
    """Raises BadRequest with the first field that is wrong or unknown."""
    try:
        return model.model_validate(dict(raw))
    except ValidationError as error:
        first = error.errors()[0]
        field = str(first["loc"][0])
        expected = f"; expected some of {', '.join(model.model_fields)}" * (first["type"] == "extra_forbidden")
        raise BadRequest(f"{field[:80]}: {first['msg']}{expected}", param=field[:80]) from None
