"""A configuration to begin with, as commented YAML: every key with what its docstring says of it.

What is usual stands as it is; what must be said by the user is filled in; the rest is there as a comment, with its
default. It knows nothing of files.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import PurePath
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from adapters.train.config import TrainConfig

WIDTH = 100
INDENT = "  "


def template(values: Mapping[str, Mapping[str, Any]]) -> str:
    """`values`: section → key → what to write instead of a comment with the default."""
    return "\n".join(_document(values)) + "\n"


def _document(values: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    yield "# A training run of loraplex; relative paths of data are relative to this file."
    yield "#   loraplex train check FILE · loraplex train estimate FILE · loraplex train run FILE"
    yield "# A key behind # has the value that is shown; take the # away to change it."
    for name, field in TrainConfig.model_fields.items():
        section = field.annotation
        assert isinstance(section, type)
        assert issubclass(section, BaseModel)
        given = values.get(name, {})
        yield ""
        yield from _comment(_own_docstring(section), "")
        yield f"{name}:" if given else f"# {name}:"
        yield from _keys(section, given, INDENT)


def _keys(section: type[BaseModel], given: Mapping[str, Any], indent: str) -> Iterator[str]:
    for name, field in section.model_fields.items():
        nested = _section_of(field)
        optional = " Left out by default." if nested is not None and field.default is None else ""
        yield from _comment(f"{field.description or ''}{_choices(field)}{optional}", indent)
        if name in given:
            yield from _written({name: given[name]}, indent, "")
        elif nested is not None:
            yield from _comment(_own_docstring(nested), indent)
            yield f"{indent}# {name}:"
            yield from _keys(nested, {}, indent + INDENT)
        else:
            value = "…" if field.is_required() else _plain(field.default)
            yield from _written({name: value}, indent, "# ")


def _choices(field: FieldInfo) -> str:
    """Of a key that takes certain words only, or those beside numbers or names."""
    kinds = (field.annotation, *get_args(field.annotation))
    words = [word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]
    return f" ({', '.join(map(str, words))})" if len(words) > 1 else ""


def _written(values: Mapping[str, Any], indent: str, mark: str) -> Iterator[str]:
    for line in yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, width=WIDTH).splitlines():
        yield f"{indent}{mark}{line}"


def _comment(text: str, indent: str) -> Iterator[str]:
    for line in textwrap.wrap(" ".join(text.split()), WIDTH - len(indent)):
        yield f"{indent}## {line}"


def _own_docstring(section: type[BaseModel]) -> str:
    """Not the one that it would inherit."""
    return inspect.cleandoc(section.__dict__.get("__doc__") or "")


def _section_of(field: FieldInfo) -> type[BaseModel] | None:
    """Of a field that is a section, or one or null; a list of them is a value."""
    for kind in (field.annotation, *get_args(field.annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel) and not field.is_required():
            return kind
    return None


def _plain(value: Any) -> Any:
    """As YAML writes it."""
    if isinstance(value, PurePath | Enum):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
