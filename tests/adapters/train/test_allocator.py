"""In a process of its own: malloc's settings cannot be taken back."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys
import torch
from pathlib import Path
from adapters.train.allocator import map_large_tensors

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

if sys.argv[1] == "mapped":
    map_large_tensors()
for _ in range(3):
    blocks = [torch.ones(number << 18) for number in range(8, 32)]
held = [torch.ones(number << 18) for number in range(8, 32)]
before = resident()
del blocks[::2], held[::2]
print((before - resident()) >> 20)
"""


def given_back_mib(how: str) -> int:
    command = [sys.executable, "-c", SCRIPT, how]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="the C library is another")
def test_what_large_tensors_held_goes_back_when_they_go() -> None:
    freed = sum(range(8, 32, 2)) * 2
    assert given_back_mib("mapped") > 0.95 * freed
    assert given_back_mib("as it is") < 0.5 * freed


LOADING = """
import sys
import torch
from contextlib import nullcontext
from pathlib import Path
from adapters.train.allocator import while_loading

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

def load():
    pairs = [(torch.ones(450_000), torch.ones(110_000)) for _ in range(200)]
    return [packed for _, packed in pairs]

torch.ones(450_000)  # after the first that goes, malloc takes those of its size from the heap
before = resident()
with while_loading() if sys.argv[1] == "loading" else nullcontext():
    kept = load()
print((resident() - before) / sum(tensor.nbytes for tensor in kept))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the C library is another")
def test_after_loading_there_is_what_was_kept_and_no_more() -> None:
    assert 0.9 < held_times("loading") < 1.2
    assert held_times("as it is") > 3


def held_times(how: str) -> float:
    """What the process has grown by, in times of what was kept."""
    return float(
        subprocess.run([sys.executable, "-c", LOADING, how], check=True, capture_output=True, text=True).stdout
    )


@pytest.mark.skipif(sys.platform != "linux", reason="no /proc")
def test_nothing_of_the_file_stays_mapped_once_the_base_is_packed(small_base: Path) -> None:
    from adapters.train.model import load_base
    from adapters.train.sections import ModelSection, QuantizationSection

    model = load_base(ModelSection(model_name_or_path=small_base), QuantizationSection())
    assert str(small_base) not in Path("/proc/self/maps").read_text()
    assert model.lm_head.weight is model.model.embed_tokens.weight, "tied still"
