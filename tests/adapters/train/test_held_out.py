"""Rows that were held out are read again as they were."""

from __future__ import annotations

from pathlib import Path

from adapters.train import held_out
from adapters.train.data import Conversation
from adapters.train.reading import read_files
from adapters.train.sections import DataFile
from adapters.upload import HELD_OUT, is_kept

CHAT = Conversation(({"role": "user", "content": "Hm?"}, {"role": "assistant", "content": "Ja, »so«."}), "a:1")
SILENT = Conversation(
    (*CHAT.messages, {"role": "user", "content": "?"}, {"role": "assistant", "content": "!", "weight": 0}), "a:2"
)
PAIR = Conversation(({"role": "prompt", "content": "1+1="}, {"role": "completion", "content": "2"}), "b:1")
TEXT = Conversation(({"role": "text", "content": "It rained.\n"},), "c:1")


def test_every_kind_of_row_comes_back(tmp_path: Path) -> None:
    for rows in ([CHAT, SILENT], [PAIR], [TEXT]):
        held_out.write_held_out(rows, tmp_path / "rows.jsonl")
        read = read_files([DataFile(path=tmp_path / "rows.jsonl")]).conversations
        assert [each.messages for each in read] == [each.messages for each in rows]


def test_of_several_formats_only_the_first_is_kept(tmp_path: Path) -> None:
    held_out.write_held_out([CHAT, TEXT, SILENT], tmp_path / "rows.jsonl")
    read = read_files([DataFile(path=tmp_path / "rows.jsonl")]).conversations
    assert [each.messages for each in read] == [CHAT.messages, SILENT.messages]


def test_they_are_bounded(tmp_path: Path) -> None:
    held_out.write_held_out([TEXT] * (held_out.ROWS + 5), tmp_path / "rows.jsonl")
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == held_out.ROWS


def test_a_server_does_not_keep_them() -> None:
    assert not is_kept((HELD_OUT,))
