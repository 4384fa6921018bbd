"""In a process of its own: malloc's settings cannot be taken back."""

import subprocess
import sys

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
