import json
from pathlib import Path

import pytest

from adapters.errors import DataError
from adapters.train.data import Conversation, digest_of, read_conversations, split_by_hash


def conversation(text: str, place: str = "x:1") -> Conversation:
    return Conversation(({"role": "user", "content": text}, {"role": "assistant", "content": "yes"}), place)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"rows.jsonl:2: not valid JSON"),
        ("[]", r"rows.jsonl:2:messages: expected"),
        ('{"messages": [{"role": "user", "content": "a"}]}', r"rows.jsonl:2:messages: no message of the assistant"),
        ('{"messages": [{"role": "bot", "content": "a"}]}', r"rows.jsonl:2:messages\[0\].role: .*got 'bot'"),
        ('{"messages": [{"role": "user", "content": " "}]}', r"rows.jsonl:2:messages\[0\].content: "),
        ('{"messages": [{"role": "user", "content": "a", "id": 1}]}', r"rows.jsonl:2:messages\[0\].id: unknown key"),
        ('{"messages": [7]}', r"rows.jsonl:2:messages\[0\]: expected an object"),
    ],
)
def test_an_error_names_file_line_and_field(tmp_path: Path, line: str, message: str) -> None:
    good = json.dumps({"messages": conversation("a").messages})
    (tmp_path / "rows.jsonl").write_text(f"{good}\n{line}\n")
    with pytest.raises(DataError, match=message):
        read_conversations([tmp_path / "rows.jsonl"])


def test_an_empty_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("\n")
    with pytest.raises(DataError, match="no conversation found"):
        read_conversations([tmp_path / "rows.jsonl"])


def test_the_split_depends_on_content_and_not_on_order() -> None:
    rows = [conversation(f"question {i}") for i in range(20)]
    one, other = split_by_hash(rows, 0.25), split_by_hash(rows[::-1], 0.25)
    assert (len(one.train), len(one.held_out)) == (15, 5)
    assert one.held_out == other.held_out
    assert digest_of(rows) == digest_of(rows[::-1]) != digest_of(rows[1:])


def test_a_copy_never_leaks_into_the_held_out_set() -> None:
    rows = [conversation(f"question {i % 5}", f"x:{i}") for i in range(20)]
    split = split_by_hash(rows, 0.4)
    assert split.duplicates == 15
    assert not {c.digest for c in split.train} & {c.digest for c in split.held_out}
