"""kill -9 in a merge: the same command ends with the same bytes, and no finished shard is made twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from adapters.base import BaseModel
from adapters.merge.plan import plan_merge
from tests.adapters.merge.models import load_model, save_model
from tests.flows.zoo import lora, make

STEP = int(os.environ.get("LORAPLEX_TEST_CRASH_STEP", "4"))
"""1 kills at every instant: a minute on a quiet machine."""


def test_a_killed_merge_goes_on_where_it_was(tmp_path: Path) -> None:
    path = save_model(tmp_path / "base", num_hidden_layers=1, shard_bytes=30_000)
    make(lora(), load_model(path), tmp_path / "a")
    shards = plan_merge(tmp_path / "a", BaseModel.read(path), "original").shards
    assert len(shards) > 2
    places = [str(place) for place in (tmp_path / "a", path, tmp_path / "work")]
    command = [sys.executable, "-m", "tests.adapters.merge.crash_child", *places, str(STEP)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    found = [json.loads(line) for line in ended.stdout.splitlines()]
    assert {"tensor", "os.rename"} < {each["instant"] for each in found}
    assert any(0 < len(each["kept"]) < len(shards) for each in found)
    print(f"{len(found) - 1} instants, {len(shards)} shards")
    assert found[-1]["ended"]
    for each in found:
        assert each["files"] == found[-1]["files"], each
        assert each["left"] == ["out"], each
        missing = [] if each["there"] else [f"{shard}.part" for shard in shards if shard not in each["kept"]]
        assert sorted(each["written"]) == sorted(missing), each
