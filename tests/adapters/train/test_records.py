import json
from pathlib import Path

from adapters.train.demo import records
from adapters.train.reading import read_files
from adapters.train.sections import DataFile


def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def test_the_files_are_those_that_the_program_makes() -> None:
    assert (lines(records.TRAINED), lines(records.HELD_OUT)) == records.tickets()


def test_no_ticket_is_trained_and_held_out() -> None:
    trained, held_out = (
        {row.messages[1]["content"] for row in read_files([DataFile(path=path)]).conversations}
        for path in (records.TRAINED, records.HELD_OUT)
    )
    assert (len(trained), len(held_out)) == (records.TRAIN_ROWS, records.HELD_OUT_ROWS)
    assert not trained & held_out


def test_every_record_has_the_schema_and_says_what_the_ticket_says() -> None:
    for row in read_files([DataFile(path=records.TRAINED), DataFile(path=records.HELD_OUT)]).conversations:
        record, text = json.loads(row.messages[2]["content"]), row.messages[1]["content"]
        assert list(record) == ["category", "product", "order", "urgent"]
        assert record["category"] in records.PROBLEMS
        assert record["product"] in text
        assert record["order"] is None or record["order"] in text
        assert record["urgent"] == any(phrase in text for phrase in records.URGENT)
