"""The merging process of a server, alone: what it says, and what is left of it after kill -9."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from adapters.base import BaseModel
from adapters.merge import worker
from adapters.merge.apply import write_merged
from adapters.merge.documents import EXPORT_RECORD, RECORD, SUMS
from adapters.merge.export.exporting import Wish
from adapters.merge.orders import BasePlace, ExportOrder, MergeOrder, Order, Proof, read_order, write_order
from adapters.merge.plan import plan_merge
from adapters.merge.verify import FILE, PICTURE

PROOF = Proof(tokens=16, accept_loss=True)


def begun(directory: Path, order: Order) -> subprocess.Popen[str]:
    directory.mkdir(exist_ok=True)
    write_order(directory, order)
    assert read_order(directory) == order
    command = [sys.executable, "-m", "adapters.merge.worker", str(directory)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def said(directory: Path, order: Order) -> list[dict[str, Any]]:
    with begun(directory, order) as process:
        assert process.stdout is not None
        messages = [json.loads(line) for line in process.stdout]
    assert process.returncode == 0
    return messages


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_a_kill_while_it_merges_costs_nothing_but_time(sure_base: Path, sure_adapter: Path, tmp_path: Path) -> None:
    base = BasePlace.of(BaseModel.read(sure_base), tmp_path / "fingerprints")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "Who are you?", "completion": " A sailor of the seven seas." * 8}))
    order = MergeOrder(str(sure_adapter), base, str(tmp_path / "out"), proof=replace(PROOF, data=(str(rows),)))
    with begun(tmp_path / "job", order) as process:
        assert process.stdout is not None
        told = (json.loads(line) for line in process.stdout)
        assert next(told) == {"stage": "planning"}
        assert next(told)["stage"] == "merging"
        process.kill()
    assert not (tmp_path / "out").exists()
    messages = said(tmp_path / "job", order)
    done = messages[-1]["done"]
    assert done["values"] == "dequantized"
    assert done["fidelity"]["judged"] == "merged, dequantized, bfloat16"
    assert (done["report"]["probes"], done["report"]["task_tokens"]) == ("rows.jsonl", 16)
    sizes = [message["bytes"] for message in messages if message.get("stage") == "merging"]
    assert sizes[-1] == done["size_bytes"]
    assert said(tmp_path / "job", order)[-1]["done"] == done  # it was there already
    write_merged(plan_merge(sure_adapter, BaseModel.read(sure_base)), tmp_path / "uninterrupted")
    kept, uninterrupted = files_of(tmp_path / "out"), files_of(tmp_path / "uninterrupted")
    assert {name for name in kept if kept[name] != uninterrupted.get(name)} == {RECORD, SUMS, FILE, PICTURE}


def test_an_nf4_export_is_judged_in_nf4_and_needs_nobody_to_accept_it(
    sure_base: Path, sure_adapter: Path, tmp_path: Path
) -> None:
    base = BasePlace.of(BaseModel.read(sure_base), tmp_path / "fingerprints")
    order = ExportOrder(str(sure_adapter), base, str(tmp_path / "out"), "nf4", "nf4", proof=Proof(tokens=64))
    done = said(tmp_path / "job", order)[-1]["done"]
    found = done["report"]["fidelity"]
    assert (found["judged"], found["trained_on"]) == ("merged, original, nf4", "dequantized")
    assert (found["within_budget"], found["reasons"]) == (True, [])
    assert found["task"]["kl"] > 0.02, "or the budget of 16 bits would have done"
    assert done["report"]["export"]["accepted"] == {}
    assert "model.safetensors" in {file["name"] for file in done["files"]}


@pytest.mark.parametrize(("loss", "differences"), [(True, False), (False, True)])
def test_what_the_caller_accepts_is_what_the_export_accepts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: bool, differences: bool
) -> None:
    wishes: list[Wish] = []

    def write(wish: Wish, _: Any) -> None:
        wishes.append(wish)
        wish.destination.mkdir()
        (wish.destination / EXPORT_RECORD).write_text("{}")

    monkeypatch.setattr(worker, "write_export", write)
    proof = Proof(accept_loss=loss, accept_differences=differences)
    place = BasePlace("/base", "base", "/fingerprints")
    order = ExportOrder("/sea", place, str(tmp_path / "out"), "gguf", "f16", proof=proof)
    assert worker.exported(order, Path("/merged"), lambda _: None) == {"export": {}}
    assert [(wish.accept_loss, wish.accept_differences) for wish in wishes] == [(loss, differences)]
