"""Strangers' JSON: what is read can be shown and written again; what would fill the memory is not parsed at all."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from adapters.errors import InvalidAdapter
from adapters.json_bounds import MAX_DEPTH, require_bounded, values_of
from adapters.json_document import read_document


def written(path: Path, content: bytes) -> Path:
    file = path / "document.json"
    file.write_bytes(content)
    return file


@pytest.mark.parametrize("text", [r'{"a": "[[[[\"{{"}', '{"a": [1, {"b": []}], "": null}', '{"a": "\\\\"}', "{}"])
def test_good_documents(tmp_path: Path, text: str) -> None:
    assert read_document(written(tmp_path, text.encode())) == json.loads(text)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"a": 1, "a": 1}', "twice"),
        (b'{"b": {"a": 1, "a": 2}}', "twice"),
        (b'{"a": ' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}", "deep"),
        (b'{"a": 1e400}', "not JSON compliant"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": "\\ud800"}', "surrogates"),
        (b'\xef\xbb\xbf{"a": 1}', "BOM"),
        ('{"a": 1}'.encode("utf-16"), "decode"),
        (b'{"a": ' + b"9" * 5000 + b"}", "digits"),
        (b"[1]", "expected an object"),
    ],
)
def test_bad_documents(tmp_path: Path, content: bytes, reason: str) -> None:
    with pytest.raises(InvalidAdapter, match=reason) as error:
        read_document(written(tmp_path, content))
    assert error.value.code == "bad_json"


def test_depth_is_counted_outside_strings() -> None:
    require_bounded(b'{"a": ' + b"[" * (MAX_DEPTH - 1) + b"]" * (MAX_DEPTH - 1) + b"}", 1000)
    require_bounded(json.dumps({"a": '"[{' * 100}).encode(), 1000)
    for text in (b'"' + b'\\"' * 500_000, b'"' * 100_000, b'"' + b"a" * 1_000_000):  # no quadratic time either
        require_bounded(text, 1 << 20)


def test_values_are_never_counted_too_low() -> None:
    contents: list[Any] = [[], [[]] * 9, {"a": 1, "b": {"c": [1, 2]}}, ["," * 5, '"' * 8]]
    for content in contents:
        text = json.dumps(content)
        assert values_of(text.encode()) >= text.count("[]") + text.count(":")


def test_a_short_text_that_makes_many_objects_is_not_parsed(tmp_path: Path) -> None:
    file = written(tmp_path, b'{"a": [' + b"[]," * 300_000 + b"[]]}")
    tracemalloc.start()
    with pytest.raises(InvalidAdapter, match="values"):
        read_document(file)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 << 20
