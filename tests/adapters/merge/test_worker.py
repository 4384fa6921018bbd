"""The merging process of a server, alone: what it says, and what is left of it after kill -9."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from adapters.base import BaseModel
from adapters.merge.orders import BasePlace, MergeOrder, read_order, write_order
from tests.adapters.merge.by_hand import base_of_ones, rank_one


def ordered(tmp_path: Path, base: BaseModel, **wishes: Any) -> Path:
    directory = tmp_path / "job"
    directory.mkdir()
    place = BasePlace.of(base, tmp_path / "fingerprints")
    order = MergeOrder(str(rank_one(tmp_path / "a")), place, str(tmp_path / "out"), **wishes)
    write_order(directory, order)
    assert read_order(directory) == order
    return directory


def said(directory: Path) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "adapters.merge.worker", str(directory)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        messages = [json.loads(line) for line in process.stdout]
    assert process.returncode == 0
    return messages


def test_it_tells_how_far_it_is_and_ends_with_the_record_also_when_it_was_done(tmp_path: Path) -> None:
    directory = ordered(tmp_path, base_of_ones(tmp_path), values="original")
    messages = said(directory)
    assert messages[0] == {"stage": "planning"}
    sizes = [message["bytes"] for message in messages if message.get("stage") == "merging"]
    assert sizes[-1] == messages[-2]["total_bytes"]
    record = json.loads((tmp_path / "out/loraplex-merge.json").read_text())
    assert messages[-1] == {"done": record}
    assert record["values"] == "original"
    again = said(directory)
    assert (len(again), again[-1]) == (2, {"done": record})


def test_a_refusal_is_told_by_its_class_and_code(tmp_path: Path) -> None:
    directory = ordered(tmp_path, base_of_ones(tmp_path), values="original")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/other").touch()
    error = said(directory)[-1]["error"]
    assert (error["class"], error["code"]) == ("Conflict", "not_empty")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["other"]
