import json
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.errors import DataError
from adapters.train.formats import FORMATS, read_row, recognise
from adapters.train.reading import read_files
from adapters.train.sections import DataFile, TrainFile

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
ASKED = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
SYSTEM = ({"role": "system", "content": "s"}, *ASKED)


def write(path: Path, *rows: Any) -> DataFile:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return DataFile(path=path)


@pytest.mark.parametrize(
    ("row", "name", "messages"),
    [
        (CHAT | {"source": "free keys are kept out"}, "messages", ASKED),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, "sharegpt", ASKED),
        ({"conversations": CHAT["messages"], "system": "s"}, "sharegpt", SYSTEM),
        ({"instruction": "a", "input": "", "output": "b"}, "alpaca", ASKED),
        ({"system": "s", "instruction": "a", "output": "b"}, "alpaca", SYSTEM),
        (
            {"instruction": "c", "input": "d", "output": "e", "history": [["a", "b"]]},
            "alpaca",
            (*ASKED, {"role": "user", "content": "c\n\nd"}, {"role": "assistant", "content": "e"}),
        ),
        (
            {"prompt": "a", "completion": "b"},
            "prompt-completion",
            ({"role": "prompt", "content": "a"}, {"role": "completion", "content": "b"}),
        ),
        ({"prompt": [ASKED[0]], "completion": [ASKED[1]]}, "prompt-completion", ASKED),
        ({"text": "a"}, "text", ({"role": "text", "content": "a"},)),
    ],
)
def test_every_format_is_detected_and_read(tmp_path: Path, row: Any, name: str, messages: Any) -> None:
    assert recognise(row, "x:1").name == name
    (read,) = read_files([write(tmp_path / "rows.jsonl", row)]).conversations
    assert read.messages == messages


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"rows.jsonl:2: not valid JSON"),
        ("[" * 100_000, r"rows.jsonl:2: nested too deeply"),
        ('{"text": ' + "1" * 5000 + "}", r"rows.jsonl:2: .*a number too long"),
        ("[]", r"rows.jsonl:2: expected an object"),
        ('{"messages": 7}', r"rows.jsonl:2:messages: expected a list of messages, got 7"),
        ('{"messages": [{"role": "user", "content": "a"}]}', r"rows.jsonl:2:messages: no message of the assistant"),
        ('{"messages": [{"role": "bot", "content": "a"}]}', r"rows.jsonl:2:messages\[0\].role: .*got 'bot'"),
        ('{"messages": [{"role": "user", "content": " "}]}', r"rows.jsonl:2:messages\[0\].content: "),
        ('{"messages": [{"role": "user", "content": "a", "id": 1}]}', r"rows.jsonl:2:messages\[0\].id: unknown key"),
        ('{"messages": [{"role": "user", "content": "\\ud800"}]}', r"rows.jsonl:2:messages\[0\].content: half a char"),
        ('{"messages": [7]}', r"rows.jsonl:2:messages\[0\]: expected an object"),
        (
            '{"instruction": "a", "output": "b"}',
            r"rows.jsonl:2:messages: expected the format messages, .* got the keys instruction, output; "
            r"this is the format alpaca",
        ),
    ],
)
def test_an_error_names_file_line_and_field(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_files([write(tmp_path / "rows.jsonl", CHAT, line)])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"conversations": [{"from": "bird", "value": "a"}]}, r"x:1:conversations\[0\].from: .*got 'bird'"),
        ({"instruction": "a", "output": 7}, r"x:1:output: expected text that is not empty, got 7"),
        ({"instruction": "a", "output": "b", "history": [["a"]]}, r"x:1:history\[0\]: expected \[question, answer\]"),
        ({"prompt": "a", "completion": ""}, r"x:1:completion: .* data.gates.empty_answers=allow"),
        ({"text": ""}, r"x:1:text: expected text that is not empty, got ''$"),
        ({"message": []}, r"x:1: got the keys message, .* nearest is messages"),
        ({"prompt": "a", "response": "b"}, r"the nearest is prompt-completion"),
        ({"instructions": "a", "outputs": "b"}, r"the nearest is alpaca"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, r"preference pairs .* are not trained"),
        ({}, r"x:1: got an object without keys"),
    ],
)
def test_a_wrong_row_says_what_was_got_and_what_was_expected(row: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_row(row, recognise(row, "x:1"), "x:1")


def test_a_format_that_is_given_is_held_to(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", {"text": "a", "prompt": "b", "completion": "c"})
    assert [c.messages[0]["role"] for c in read_files([file]).conversations] == ["prompt"]
    as_text = file.model_copy(update={"format": "text"})
    assert [c.messages[0]["role"] for c in read_files([as_text]).conversations] == ["text"]
    with pytest.raises(DataError, match=r"rows.jsonl:1:instruction: expected the format alpaca"):
        read_files([file.model_copy(update={"format": "alpaca"})])


def test_an_answer_of_weight_0_is_kept_and_any_other_weight_is_an_error(tmp_path: Path) -> None:
    talk: list[dict[str, Any]] = [
        *CHAT["messages"],
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d", "weight": 0},
    ]
    (read,) = read_files([write(tmp_path / "rows.jsonl", {"messages": talk})]).conversations
    assert [message.get("weight") for message in read.messages] == [None, None, None, 0]
    talk[-1] |= {"weight": 0.5}
    with pytest.raises(DataError, match=r"messages\[3\].weight: expected 1, or 0"):
        read_files([write(tmp_path / "rows.jsonl", {"messages": talk})])


def test_every_example_that_an_error_shows_is_of_its_format() -> None:
    for name, shape in FORMATS.items():
        assert recognise(json.loads(shape.example.replace(", …]", "]")), "x:1").name == name


def test_a_json_array_is_read_with_the_line_of_each_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([CHAT, CHAT, CHAT], indent=1) + "\n")
    places = [c.place for c in read_files([DataFile(path=path)]).conversations]
    lines = path.read_text().split("\n")
    assert [lines[int(place.rpartition(":")[2]) - 1] for place in places] == [" {", " {", " {"]
    assert len(set(places)) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[\n{"text": "a"},\n{"text": }]', "rows.json:3: not valid JSON"),
        ('[\n{"text": "a"}\n{"text": "b"}]', "rows.json:3: expected a comma or"),
        ('[\n{"text": "a"},', "rows.json:2: the array is not closed"),
        ('[\n{"text": "a"}', "rows.json:2: expected a comma or|rows.json:2: the array is not closed"),
        ('[\n{"text": "a"},\n{"txt": "b"}]', "rows.json:3:text: expected the format text"),
        ("[]", "no conversation found"),
    ],
)
def test_a_broken_array_says_where(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(DataError, match=message):
        read_files([DataFile(path=tmp_path / "rows.json")])


def test_only_a_newline_ends_a_line_and_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes('\ufeff{"text": "a\u2028b\x85c"}\r\n\n{"text": "d"}'.encode())
    rows = read_files([DataFile(path=tmp_path / "rows.jsonl")]).conversations
    assert [row.messages[0]["content"] for row in rows] == ["a\u2028b\x85c", "d"]
    assert [row.place.rpartition(":")[2] for row in rows] == ["1", "3"]


def test_bytes_that_are_no_text_are_named_by_line(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(DataError, match=r"rows.jsonl:2: not UTF-8 text: byte 11 of the line is 0xff"):
        read_files([DataFile(path=tmp_path / "rows.jsonl")])


def test_all_wrong_rows_are_told_at_once_and_not_more_than_ten(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", {"text": "a"}, *["{"] * 12)
    with pytest.raises(DataError, match=r"(?s)rows.jsonl:2: .*rows.jsonl:11: [^\n]*\n… and 2 rows more$"):
        read_files([file])


def test_wrong_rows_are_skipped_up_to_a_cap(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", "{", {"text": "a"}, {"txt": "b"}, {"text": "c"})
    reading = read_files([file], max_skipped=2)
    assert [row.messages[0]["content"] for row in reading.conversations] == ["a", "c"]
    assert [reason.partition(" ")[0].rpartition("rows.jsonl:")[2] for reason in reading.skipped] == ["1:", "3:text:"]
    with pytest.raises(DataError, match=r"2 wrong rows, more than data.max_skipped=1"):
        read_files([file], max_skipped=1)


def test_an_empty_answer_can_be_allowed(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", {"instruction": "say nothing", "output": ""})
    with pytest.raises(DataError, match=r"rows.jsonl:1:output: expected text that is not empty"):
        read_files([file])
    assert read_files([file], empty_answers=True).conversations[0].messages[1]["content"] == ""
    blank = write(tmp_path / "blank.jsonl", {"instruction": "", "output": "b"})
    with pytest.raises(DataError, match=r"blank.jsonl:1:instruction"):
        read_files([blank], empty_answers=True)


def test_a_files_weight_goes_with_its_rows(tmp_path: Path) -> None:
    file = TrainFile(path=write(tmp_path / "rows.jsonl", {"text": "a"}).path, weight=2.5)
    assert [row.weight for row in read_files([file]).conversations] == [2.5]


def test_a_file_without_a_row_and_one_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no conversation found"):
        read_files([write(tmp_path / "rows.jsonl", "")])
    with pytest.raises(DataError, match=r"absent.jsonl: cannot be read: No such file"):
        read_files([DataFile(path=tmp_path / "absent.jsonl")])


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["user", "assistant"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.text(max_size=6) | st.sampled_from(["role", "content", "weight", "from"]), inner, max_size=4
        )
    ),
    max_leaves=12,
)
ROWS = st.dictionaries(
    st.sampled_from([key for shape in FORMATS.values() for key in shape.keys] + ["system", "history", "input"]), JSON
)


@given(st.lists(JSON | ROWS, max_size=4), st.sampled_from(["auto", *FORMATS]), st.booleans(), st.booleans())
@settings(max_examples=300, deadline=None)
def test_any_json_is_read_or_is_an_error_with_its_line(rows: Any, name: Any, array: bool, empty: bool) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / ("rows.json" if array else "rows.jsonl")
        path.write_text(json.dumps(rows, indent=1) if array else "\n".join(map(json.dumps, rows)))
        try:
            said = str(len(read_files([DataFile(path=path, format=name)], empty_answers=empty).conversations))
        except DataError as error:
            said = error.message
    assert re.match(rf"{len(rows)}$|{re.escape(str(path))}:\d+:|.*no conversation found", said)


@given(st.binary(max_size=60))
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_read_or_are_an_error(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as directory:
        for name in ("rows.json", "rows.jsonl"):
            path = Path(directory) / name
            path.write_bytes(b"[" + content)
            with pytest.raises(DataError, match=r"rows.jsonl?:\d+:|no conversation found"):
                read_files([DataFile(path=path)])
