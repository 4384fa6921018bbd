"""Tokenizer files beside an adapter: noticed, compared, never served."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from adapters.base import BaseModel
from adapters.errors import InvalidAdapter
from adapters.tokenizer_files import chat_template_sha256, check_tokenizer
from tests.adapters.factories import VOCABULARY

KNOWN = {"id": 3, "content": "<end>"}
NEW = {"id": 4, "content": "<new>"}


def staged(path: Path, **files: Any) -> Path:
    directory = path / "staged"
    directory.mkdir()
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (directory / name.replace("__", ".")).write_text(text)
    return directory


def test_the_base_s_own_files_raise_no_question(tmp_path: Path, tiny_base: BaseModel) -> None:
    base_files = {name: (tiny_base.path / name).read_text() for name in ("tokenizer.json", "chat_template.jinja")}
    files = {name.replace(".", "__"): text for name, text in base_files.items()}
    assert check_tokenizer(staged(tmp_path, **files), tiny_base.path) == []


def test_another_template_is_told(tmp_path: Path, tiny_base: BaseModel) -> None:
    [warning] = check_tokenizer(staged(tmp_path, chat_template__jinja="other"), tiny_base.path)
    assert warning.startswith("chat_template.jinja are kept but not used")


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer__json": {"model": {"vocab": {"a": 1}}, "added_tokens": [KNOWN]}},
        {"tokenizer_config__json": {"added_tokens_decoder": {"3": {"content": "<end>"}, "x": 1}}},
        {"added_tokens__json": {"<end>": 3}},
        {"tokenizer__json": {"model": None, "added_tokens": 5}},
        {"special_tokens_map__json": {"eos_token": "<end>"}},
    ],
)
def test_known_tokens_pass_with_a_warning(tmp_path: Path, tiny_base: BaseModel, files: dict[str, Any]) -> None:
    assert len(check_tokenizer(staged(tmp_path, **files), tiny_base.path)) == 1


@pytest.mark.parametrize(
    ("files", "code"),
    [
        ({"tokenizer__json": {"model": {"vocab": VOCABULARY}, "added_tokens": [NEW]}}, "adds_tokens"),
        ({"tokenizer__json": {"model": {"vocab": {**VOCABULARY, "c": 4}}}}, "adds_tokens"),
        ({"tokenizer__json": {"model": {"vocab": [["<pad>", 0], ["zzz", -1.5]]}}}, "adds_tokens"),
        ({"tokenizer_config__json": {"added_tokens_decoder": {"4": NEW}}}, "adds_tokens"),
        ({"added_tokens__json": {"<new>": 4}}, "adds_tokens"),
        ({"vocab__json": {"a": 2, "b": 1}}, "other_tokenizer"),
        ({"added_tokens__json": "{"}, "bad_json"),
        ({"tokenizer_config__json": {"added_tokens_decoder": {"9" * 5000: NEW, "4": NEW}}}, "adds_tokens"),
    ],
)
def test_other_vocabularies_are_refused(tmp_path: Path, tiny_base: BaseModel, files: dict[str, Any], code: str) -> None:
    with pytest.raises(InvalidAdapter) as error:
        check_tokenizer(staged(tmp_path, **files), tiny_base.path)
    assert error.value.code == code


@pytest.mark.parametrize(("number", "refused"), [(3, False), (4, True)])
def test_without_a_base_vocabulary_its_size_decides(
    tmp_path: Path, tiny_base: BaseModel, number: int, refused: bool
) -> None:
    (tiny_base.path / "tokenizer.json").unlink()
    directory = staged(tmp_path, added_tokens__json={"<new>": number})
    if refused:
        with pytest.raises(InvalidAdapter, match="not in the base's vocabulary"):
            check_tokenizer(directory, tiny_base.path)
    else:
        assert len(check_tokenizer(directory, tiny_base.path)) == 1


def test_template_digest_reads_either_place(tmp_path: Path, tiny_base: BaseModel) -> None:
    from_file = chat_template_sha256(tiny_base.path)
    (tiny_base.path / "chat_template.jinja").unlink()
    assert chat_template_sha256(tiny_base.path) is None
    (tiny_base.path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    assert chat_template_sha256(tiny_base.path) == from_file
