"""The training process of a server, alone: what it says, and when it goes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

LEAST = 1 << 28


@pytest.fixture
def directory(small_base: Path, tmp_path: Path) -> Path:
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    sections: dict[str, Any] = {
        "model": {"model_name_or_path": str(small_base)},
        "data": {"train": ["rows.jsonl"]},
        "training": {"max_steps": 1},
        "output": {"output_dir": "out", "name": "a"},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(sections))
    return tmp_path


def begun(directory: Path, *flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "adapters.train.worker", str(directory), *flags]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )


def test_what_takes_more_memory_than_it_may_is_told_and_ends_well(directory: Path) -> None:
    with begun(directory, "--memory-bytes", str(LEAST)) as process:
        assert process.stdout is not None
        *_, last = [json.loads(line) for line in process.stdout]
    assert last["error"]["code"] == "out_of_memory"
    assert str(LEAST) in last["error"]["message"]
    assert process.returncode == 0


def test_what_would_not_fit_is_refused_before_the_base_is_loaded(directory: Path) -> None:
    rows = [[{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}!"}] for n in range(40)]
    (directory / "rows.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    with begun(directory, "--memory-bytes", "600000000") as process:
        assert process.stdout is not None
        validating, refused = [json.loads(line) for line in process.stdout]
    assert validating == {"stage": "validating"}
    assert refused["error"]["code"] == "would_not_fit"
    assert "MB, and may take 600 MB (fine_tuning_memory_bytes" in refused["error"]["message"]
    assert "use a smaller batch_size" in refused["error"]["message"]
    assert process.returncode == 0


def test_it_goes_at_once_when_its_parent_closes_its_input(directory: Path) -> None:
    path = directory / "run.yaml"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"training": {"max_steps": 100_000}}))
    with begun(directory) as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline()) == {"stage": "validating"}
        process.communicate(timeout=120)
    assert process.returncode == 1
    assert not (directory / "out").exists()
