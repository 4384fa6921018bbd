from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from adapters.errors import DataError
from adapters.merge.probes import CHATS, PROSE, gather
from adapters.train.labels import IGNORED, Example
from adapters.upload import HELD_OUT

NO_BUDGET = 1 << 20


def write(path: Path, *questions: str) -> Path:
    rows = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "Ahoy, matey!"}]}
        for text in questions
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def said(example: Example, tokenizer: Any) -> str:
    text: str = tokenizer.decode([label for label in example.labels if label != IGNORED])
    return text


def test_files_that_are_given_come_first(tokenizer: Any, tmp_path: Path) -> None:
    write(tmp_path / HELD_OUT, "one", "two")
    probes = gather(tmp_path, tokenizer, NO_BUDGET, [write(tmp_path / "given.jsonl", "who?")])
    assert probes.source == "given.jsonl"
    assert [said(example, tokenizer) for example in probes.task] == ["Ahoy, matey!<|im_end|>"]


def test_then_what_the_adapter_held_out(tokenizer: Any, tmp_path: Path) -> None:
    write(tmp_path / HELD_OUT, "one", "two", "two")
    probes = gather(tmp_path, tokenizer, NO_BUDGET)
    assert probes.source == "held out of its training"
    assert len(probes.task) == 2


def test_then_chats_of_our_own(tokenizer: Any, tmp_path: Path) -> None:
    probes = gather(tmp_path, tokenizer, NO_BUDGET)
    assert len(probes.task) == len(CHATS.read_text().splitlines())
    assert len(probes.general) == len(PROSE.read_text().splitlines())
    assert any("1.3 seconds" in said(example, tokenizer) for example in probes.task)


def test_a_base_without_a_chat_template_reads_them_as_text(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", None)
    probes = gather(tmp_path, tokenizer, NO_BUDGET)
    assert probes.source.endswith("as plain text")
    assert "<|im_start|>" not in tokenizer.decode(probes.task[0].ids)


def test_no_more_tokens_are_measured_than_the_budget(tokenizer: Any, tmp_path: Path) -> None:
    probes = gather(tmp_path, tokenizer, 50)
    assert (probes.task_tokens, probes.general_tokens) == (50, 25)
    whole = gather(tmp_path, tokenizer, NO_BUDGET)
    assert probes.task[0].ids == whole.task[0].ids[: len(probes.task[0].ids)]


def test_general_text_can_be_given(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "general.jsonl").write_text('{"text": "It rained all day."}\n')
    probes = gather(tmp_path, tokenizer, NO_BUDGET, general=tmp_path / "general.jsonl")
    assert [said(example, tokenizer) for example in probes.general] == [" rained all day.<|im_end|>"]


def test_a_file_that_cannot_be_read_is_an_error_with_its_line(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"nothing": 1}\n')
    with pytest.raises(DataError, match=r"bad\.jsonl:1"):
        gather(tmp_path, tokenizer, NO_BUDGET, [tmp_path / "bad.jsonl"])
