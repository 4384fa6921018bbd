"""A merge holds one tensor at a time, and its check one layer, however large the base is; measured in a child."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

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

CHECKED = """
import json, resource, sys
import torch
from pathlib import Path
from transformers import AutoConfig, AutoModelForCausalLM
from adapters.merge.layers import LayerByLayer
from adapters.merge.models import log_probabilities
from adapters.merge.named_tensors import Computed
from adapters.train.allocator import map_large_tensors
from adapters.train.labels import Example

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

map_large_tensors()
directory = Path(sys.argv[1])
with torch.device("meta"):
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
    shapes = {name: each.shape for name, each in model.named_parameters()}
weights = Computed(shapes, lambda name: torch.full(shapes[name], 0.01, dtype=torch.bfloat16))
words = [Example(tuple(range(1, 9)), tuple(range(1, 9)), False)] * 20
before = peak()
loaded = LayerByLayer().of(directory, weights, torch.float32)
said = sum(len(rows) for _, rows, _ in log_probabilities(loaded, {"task": words}, 0))
print(said, before, peak())
"""
WORDS, LAYERS, HIDDEN, INNER = 32_768, 8, 1024, 2816
HEAD_BYTES = 4 * WORDS * HIDDEN
LAYER_BYTES = 4 * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * INNER)
"""Both in fp32."""


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


def test_a_check_does_not_hold_the_model(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    config.save_pretrained(tmp_path)
    told = subprocess.run([sys.executable, "-c", CHECKED, tmp_path], capture_output=True, text=True, check=True).stdout
    said, before, after = map(int, told.splitlines()[-1].split())
    sizes = f"{LAYERS} layers of {LAYER_BYTES >> 20} MB, embedding and head of {HEAD_BYTES >> 20} MB in fp32"
    print(f"{sizes}, heard with {after - before >> 20} MB more")
    assert said == 20 * 7
    assert after - before < HEAD_BYTES, "in bf16 it takes half of that, and there is the layer before it"


SIDES = {"A": (1, SHAPE[1]), "B": (SHAPE[0], 1)}
