import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapters.errors import ConfigError, DataError
from adapters.train.config import load_config
from adapters.train.prepare import Prepared, prepare

Row = dict[str, str]


def row(question: str, answer: str = "Aye.") -> Row:
    return {"instruction": question, "output": answer}


TASK = [row(f"Where is island {number}?", f"{number} miles off.") for number in range(20)]
GENERAL = [{"text": f"Rain number {number} fell on the plain."} for number in range(20)]


@pytest.fixture
def prepared(write_yaml: Callable[..., Path], tokenizer: Any, tmp_path: Path) -> Callable[..., Prepared]:
    """Prepare files, each a list of rows, with the `data` section's keys as given."""

    def run(files: dict[str, list[Any]], general_set: str | None = None, **data: Any) -> Prepared:
        section = {"train": ["task.jsonl"], "eval_split": 0.25} | data
        if "eval" in section:
            del section["eval_split"]
        values = {"model": {"model_name_or_path": str(tmp_path)}, "data": section}
        values |= {"training": {"max_steps": 1}, "output": {"output_dir": "out", "name": "x"}}
        values |= {"eval": {"general_set": general_set}} if general_set else {}
        for name, rows in files.items():
            (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / "run.yaml").write_text(json.dumps(values))  # JSON is YAML
        config = load_config(tmp_path / "run.yaml")
        return prepare(config.data, config.eval, tokenizer)

    return run


def test_a_file_of_held_out_rows_is_held_out_and_nothing_is_split_off(prepared: Callable[..., Prepared]) -> None:
    data = prepared({"task.jsonl": TASK, "held.jsonl": [row("And the sea?")]}, eval="held.jsonl")
    assert (len(data.epoch), len(data.held_out)) == (20, 1)


def test_a_file_of_held_out_rows_and_a_split_exclude_each_other(write_yaml: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match="eval and eval_split exclude each other"):
        load_config(write_yaml(data={"eval": "held.jsonl"}))


@pytest.mark.parametrize(
    ("held", "how"),
    [(row("Where is island 3?", "3 miles off."), "is"), (row("where is ISLAND 3", "3 miles off"), "is nearly")],
)
def test_what_is_trained_and_held_out_is_named_on_both_sides(
    prepared: Callable[..., Prepared], held: Row, how: str
) -> None:
    files = {"task.jsonl": TASK, "held.jsonl": [row("other"), held]}
    with pytest.raises(DataError, match=rf"1 rows are trained and held out.*task.jsonl:4 {how} \S*held.jsonl:2$"):
        prepared(files, eval="held.jsonl")
    dropped = prepared(files, eval="held.jsonl", gates={"leakage": "drop"})
    assert (len(dropped.epoch), len(dropped.held_out), dropped.survey.leaked) == (19, 2, 1)
    assert not [example for example in dropped.epoch if example.place.endswith("task.jsonl:4")]
    allowed = prepared(files, eval="held.jsonl", gates={"leakage": "allow"})
    assert len(allowed.epoch) == 20


def test_dropping_every_row_is_refused(prepared: Callable[..., Prepared]) -> None:
    with pytest.raises(DataError, match="no row is left to train"):
        prepared({"task.jsonl": TASK, "held.jsonl": TASK}, eval="held.jsonl", gates={"leakage": "drop"})


def test_general_data_that_is_trained_leaks_too(prepared: Callable[..., Prepared]) -> None:
    files = {"task.jsonl": [*TASK, GENERAL[5]], "text.jsonl": GENERAL}
    files["task.jsonl"] = [{"text": json.dumps(task)} for task in TASK] + [GENERAL[5]]
    with pytest.raises(DataError, match=r"task.jsonl:21 is \S*text.jsonl:6"):
        prepared(files, general_set="text.jsonl")


def test_copies_are_left_out_and_too_many_are_refused(prepared: Callable[..., Prepared]) -> None:
    some = prepared({"task.jsonl": [*TASK, TASK[0], TASK[1]]})
    assert (some.survey.rows, some.survey.held_out, some.survey.duplicates) == (15, 5, 2)
    with pytest.raises(DataError, match=r"3 of 23 rows are copies.*: \S*task.jsonl:21 is \S*task.jsonl:1 again, "):
        prepared({"task.jsonl": [*TASK, *TASK[:3]]})
    assert prepared({"task.jsonl": [*TASK, *TASK[:3]]}, gates={"max_duplicates": 0.2}).survey.duplicates == 3


LONG = row("long?", "very " * 100)


def test_cut_rows_are_counted_and_too_many_are_refused(prepared: Callable[..., Prepared]) -> None:
    files = {"task.jsonl": [*TASK, LONG], "held.jsonl": [row("other")]}
    assert prepared(files, eval="held.jsonl", max_length=64).survey.truncated == 1
    with pytest.raises(
        DataError, match=r"1 of 21 rows are cut at data.max_length=64, .*task.jsonl:21 \(1\d\d tokens\)"
    ):
        prepared(files, eval="held.jsonl", max_length=64, gates={"max_truncated": 0.01})


def test_a_row_that_looks_like_many_is_refused(prepared: Callable[..., Prepared]) -> None:
    files = {"task.jsonl": [*TASK, row("long?", "very " * 1200)], "held.jsonl": [row("other")]}
    with pytest.raises(DataError, match=r"1 rows are longer than 1024 tokens, .*task.jsonl:21"):
        prepared(files, eval="held.jsonl", max_length=64)
    assert prepared(files, eval="held.jsonl", max_length=64, gates={"max_row_tokens": 2000}).survey.truncated == 1


def test_rows_without_a_trained_token_are_refused_or_dropped(prepared: Callable[..., Prepared]) -> None:
    files = {"task.jsonl": [*TASK, row("why? " * 100)], "held.jsonl": [row("other")]}
    with pytest.raises(DataError, match=r"1 rows have no token to train within data.max_length=64.*task.jsonl:21"):
        prepared(files, eval="held.jsonl", max_length=64)
    dropped = prepared(files, eval="held.jsonl", max_length=64, gates={"untrained": "drop"})
    assert (len(dropped.epoch), dropped.survey.untrained) == (20, 1)
    assert all(example.trained_tokens for example in dropped.epoch)


def test_data_with_nothing_at_all_to_train_cannot_be_let_through(prepared: Callable[..., Prepared]) -> None:
    files = {"task.jsonl": TASK, "held.jsonl": [row("other")]}
    gates = {"untrained": "drop", "unended": "allow", "max_truncated": 1}
    with pytest.raises(
        DataError, match=r"20 rows have no token to train within data.max_length=16(.|\n)*1 rows have no token"
    ):
        prepared(files, eval="held.jsonl", max_length=16, gates=gates)


def test_answers_that_never_end_are_refused(prepared: Callable[..., Prepared]) -> None:
    files = {"task.jsonl": [LONG, row("longer?", "so " * 100)], "held.jsonl": [row("other")]}
    gates: dict[str, Any] = {"max_truncated": 1}
    with pytest.raises(DataError, match=r"no answer ends within data.max_length=64, .*task.jsonl:"):
        prepared(files, eval="held.jsonl", max_length=64, gates=gates)
    allowed = prepared(files, eval="held.jsonl", max_length=64, gates=gates | {"unended": "allow"})
    assert len(allowed.epoch) == 2


def test_one_error_tells_all_that_is_wrong(prepared: Callable[..., Prepared]) -> None:
    files = {"task.jsonl": [LONG, row("why? " * 100)], "held.jsonl": [row("other")]}
    with pytest.raises(DataError, match=r"(?s)are cut at.*no token to train.*no answer ends"):
        prepared(files, eval="held.jsonl", max_length=64)


def test_a_files_weight_is_how_often_its_rows_are_seen(prepared: Callable[..., Prepared]) -> None:
    files = {"task.jsonl": TASK, "more.jsonl": [row(f"More {n}?") for n in range(200)], "held.jsonl": [row("other")]}
    train = [{"path": "task.jsonl", "weight": 3}, {"path": "more.jsonl", "weight": 0.25, "format": "alpaca"}]
    data = prepared(files, eval="held.jsonl", train=train)
    seen = [example.place.rpartition("/")[2].partition(":")[0] for example in data.epoch]
    assert seen.count("task.jsonl") == 60
    assert 30 <= seen.count("more.jsonl") == len({e.place for e in data.epoch}) - 20 <= 70
    assert data.survey.rows == 220


@pytest.mark.parametrize("ratio", [0.05, 0.1, 0.3])
def test_replay_is_its_share_of_the_tokens(prepared: Callable[..., Prepared], ratio: float) -> None:
    files = {"task.jsonl": TASK, "text.jsonl": GENERAL * 1 + [{"text": f"Wind {n} blows."} for n in range(40)]}
    data = prepared(files, replay={"path": "text.jsonl", "ratio": ratio})
    general = sum(len(e.ids) for e in data.epoch if "text.jsonl" in e.place)
    total = sum(len(e.ids) for e in data.epoch)
    longest = max(len(e.ids) for e in data.epoch if "text.jsonl" in e.place)
    assert ratio * total <= general + 1 <= ratio * total + longest + 1
    assert data.survey.replay_share == pytest.approx(general / total)


def test_without_a_general_set_a_part_of_the_replay_data_is_held_out(prepared: Callable[..., Prepared]) -> None:
    data = prepared({"task.jsonl": TASK, "text.jsonl": GENERAL}, replay={"path": "text.jsonl", "ratio": 0.1})
    assert len(data.general) == 5
    assert not {e.place for e in data.general} & {e.place for e in data.epoch}


def test_too_little_general_data_says_which_ratio_it_is_enough_for(prepared: Callable[..., Prepared]) -> None:
    files = {"task.jsonl": TASK, "text.jsonl": GENERAL[:4], "other.jsonl": GENERAL[4:]}
    with pytest.raises(DataError, match=r"needs \d+ tokens, and the file has \d+; .* data.replay.ratio=0.0\d\d"):
        prepared(files, "other.jsonl", replay={"path": "text.jsonl", "ratio": 0.5})


def test_the_order_of_rows_in_a_file_changes_nothing(prepared: Callable[..., Prepared]) -> None:
    one = prepared({"task.jsonl": TASK, "text.jsonl": GENERAL}, replay={"path": "text.jsonl"})
    other = prepared({"task.jsonl": TASK[::-1], "text.jsonl": GENERAL[::-1]}, replay={"path": "text.jsonl"})
    assert [e.ids for e in one.epoch] == [e.ids for e in other.epoch]
