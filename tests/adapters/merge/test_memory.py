"""A merge holds one tensor at a time, however large the base is; as a whole process, measured in a child."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.adapters.merge.by_hand import written

SHARDS, TENSORS, SHAPE = 8, 8, (2048, 1024)
SHARD_BYTES = TENSORS * SHAPE[0] * SHAPE[1] * 2
CHILD = """
import resource, sys
import bitsandbytes, peft, torch
from adapters.merge.cli import main

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

root = sys.argv[1]
words = [root + "/a", "--base", root + "/base", "--out", root + "/out", "--from", "original", "--no-verify"]
assert main([*words, "--dry-run"]) == 0
before = peak()
assert main(words) == 0
print(before, peak())
"""


def large_base(path: Path) -> list[str]:
    """Its modules."""
    path.mkdir()
    weight_map: dict[str, str] = {}
    for shard in range(SHARDS):
        name = f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors"
        modules = [f"model.layers.{shard * TENSORS + number}.up_proj" for number in range(TENSORS)]
        save_file({f"{module}.weight": torch.ones(SHAPE, dtype=torch.bfloat16) for module in modules}, path / name)
        weight_map |= dict.fromkeys(modules, name)
    index = {"weight_map": {f"{module}.weight": name for module, name in weight_map.items()}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "config.json").write_text("{}")
    return list(weight_map)


def test_a_merge_does_not_hold_the_model(tmp_path: Path) -> None:
    modules = large_base(tmp_path / "base")
    pairs = {f"{module}.lora_{side}.weight": torch.ones(shape) for module in modules for side, shape in SIDES.items()}
    written(tmp_path / "a", pairs, r=1)
    told = subprocess.run([sys.executable, "-c", CHILD, tmp_path], capture_output=True, text=True, check=True).stdout
    before, after = map(int, told.splitlines()[-1].split())
    print(f"a base of {SHARDS} shards of {SHARD_BYTES >> 20} MB, merged with {after - before >> 20} MB more")
    assert after - before < 3 * SHARD_BYTES
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == SHARDS


SIDES = {"A": (1, SHAPE[1]), "B": (SHAPE[0], 1)}
