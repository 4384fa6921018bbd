"""How much memory there is and how much a run has taken: of a CUDA device, or of this process and its cgroup."""

from __future__ import annotations

import contextlib
import os
import re
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters.errors import ConfigError

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
CGROUPS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
STATUS = Path("/proc/self/status")
RESET_PEAK = "5"
"""What proc(5) says to write to clear_refs."""


def parse_bytes(text: str) -> int:
    match = re.fullmatch(r"([0-9.]+)\s*([KMGT]?I?B?)", text.strip().upper())
    try:
        assert match is not None
        return round(float(match[1]) * UNITS[match[2]])
    except (AssertionError, KeyError, ValueError):
        raise ConfigError(f"{text!r} is no amount of memory; expected one like 24GB, 8GiB or 512MB") from None


def limit_bytes() -> int:
    """Of the first CUDA device, where there is one; else of the machine, or what this cgroup or this process may take
    where that is less."""
    if device := _cuda():
        return int(device.get_device_properties(0).total_memory)
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    own, _ = resource.getrlimit(resource.RLIMIT_DATA)
    limits = [machine, *(int(text) for text in _cgroup_limits() if text.isdigit())]
    return min(limits if own == resource.RLIM_INFINITY else [*limits, own])


def _cgroup_limits() -> Iterator[str]:
    for path in CGROUPS:
        with contextlib.suppress(OSError):
            yield path.read_text().strip()


@dataclass
class Usage:
    peak: int = 0
    """Bytes at most: of this process, or on a GPU of what torch held there."""


@contextlib.contextmanager
def measured() -> Iterator[Usage]:
    """The peak of the block: of CUDA's allocator, or of this process's resident memory."""
    usage = Usage()
    if device := _cuda():
        device.reset_peak_memory_stats()
        yield usage
        usage.peak = int(device.max_memory_allocated())
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text(RESET_PEAK)
    yield usage
    (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    usage.peak = int(line.split()[1]) * 1024


def has_cuda() -> bool:
    return _cuda() is not None


def _cuda() -> Any:
    try:
        import torch
    except ImportError:
        return None
    return torch.cuda if torch.cuda.is_available() else None
