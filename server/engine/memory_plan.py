"""Memory for one more engine: what it will take, term by term, against what is free; and no when it does not fit.

Calculated from the headers of its weights and from settings, before anything is merged or built. It does not know what
the engines that are up have taken: that is gone from what is free. Knows CUDA by reading only.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters.base import CONFIG, PACKED_STATE, BaseModel, shards_of
from adapters.merge.bases import BLOCK
from adapters.safetensors_header import TensorSpan, read_header
from server.errors import MergedEngineRefused
from server.settings import Settings

MIB = 1 << 20
FLOATING = ("F64", "F32", "F16", "BF16")
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
NF4_BYTES = 1 / 2 + 4 / BLOCK
"""Of a weight: its code, and its part of a block's scale, which the engine unfolds to fp32."""
PROCESS_BYTES = {"cpu": 900 * MIB, "cuda": 1536 * MIB}
"""An engine's process without weights and KV cache. CPU: measured (loadtests/RESULTS.md); CUDA: context and workspace,
an estimate."""
STEP_TOKENS = 2048
"""vLLM's `max_num_batched_tokens`, at the least."""
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class MemoryPlan:
    """What one engine will take, in bytes."""

    terms: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.terms.values())

    def require(self, free: int, reserve: int) -> None:
        """Raises MergedEngineRefused with the whole sum."""
        if self.total + reserve <= free:
            return
        terms = " + ".join(f"{shown(size)} {what}" for what, size in self.terms.items())
        raise MergedEngineRefused(
            f"an engine of merged weights takes {terms} = {shown(self.total)}, and {shown(reserve)} must stay free "
            f"(memory_reserve_bytes); free are {shown(free)}, {shown(self.total + reserve - free)} too little. Make "
            "room, or lower merged_kv_cache_memory_bytes or the base engine's own memory",
            code="engine_does_not_fit",
        )


def plan_of(directory: Path, settings: Settings) -> MemoryPlan:
    """For the weights in `directory`, as they are."""
    return _plan(_held(_tensors(directory), settings), directory, settings)


def plan_of_merge(base: BaseModel, settings: Settings, *, quantised: bool = False) -> MemoryPlan:
    """For what will be merged into `base`: its shapes, nothing quantised, or every linear weight in NF4."""
    size = BYTES[settings.dtype]
    linear = {f"{module}.weight": math.prod(shape) for module, shape in base.modules.items()}
    others = sum(
        math.prod(span.shape)
        for name, span in _tensors(base.path).items()
        if name not in linear and not _describes_packed(name, linear)
    )
    each = NF4_BYTES if quantised else size
    return _plan(math.ceil(sum(linear.values()) * each) + others * size, base.path, settings)


def free_bytes(settings: Settings) -> int:
    """Of the first GPU, or of this machine and its cgroup."""
    return _free_on_gpu()[0] if settings.device == "cuda" else free_on_machine()


def gpu_share(plan: MemoryPlan, settings: Settings) -> float | None:
    """vLLM is told its memory on a GPU as a share of the whole."""
    return None if settings.device == "cpu" else round(plan.total / _free_on_gpu()[1], 4)


def shown(size: int) -> str:
    return f"{size / (1 << 30):.2f} GiB"


def _plan(weights: int, directory: Path, settings: Settings) -> MemoryPlan:
    return MemoryPlan(
        {
            "weights": weights,
            "KV cache": settings.merged_kv_cache_bytes,
            "for a step": _step_bytes(json.loads((directory / CONFIG).read_text()), settings),
            "for the process": PROCESS_BYTES[settings.device],
        }
    )


def _tensors(directory: Path) -> dict[str, TensorSpan]:
    return {name: span for shard in shards_of(directory) for name, span in read_header(shard).items()}


def _held(tensors: Mapping[str, TensorSpan], settings: Settings) -> int:
    """As the engine holds them: floats in its own type, packed codes as they lie, double-quantised scales unfolded."""
    total = 0
    for name, span in tensors.items():
        if span.dtype in FLOATING and not name.endswith((".absmax", ".nested_absmax")):
            total += math.prod(span.shape) * BYTES[settings.dtype]
        elif name.endswith(".absmax"):
            total += math.prod(span.shape) * 4
        else:
            total += span.size_bytes
    return total


def _describes_packed(name: str, weights: Mapping[str, int]) -> bool:
    """Whether a tensor is a part of a packed weight that is no weight itself."""
    return name not in weights and (PACKED_STATE in name or name.rpartition(".")[0] in weights)


def _step_bytes(config: Mapping[str, Any], settings: Settings) -> int:
    """Activations of one layer for as many tokens as a step takes, and logits in fp32, three times."""
    hidden, vocabulary = int(config.get("hidden_size", 4096)), int(config.get("vocab_size", 32_000))
    inner = int(config.get("intermediate_size", 4 * hidden))
    layer = STEP_TOKENS * (6 * hidden + 3 * inner) * BYTES[settings.dtype]
    return layer + 3 * 4 * settings.sequences * vocabulary


def free_on_machine() -> int:
    """What Linux thinks can be had without swapping, and no more than this cgroup may have."""
    meminfo = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(meminfo["MemAvailable"].split()[0]) * 1024
    with suppress(OSError, ValueError):  # without a limit it says `max`
        limit = int((CGROUP / "memory.max").read_text())
        used = int((CGROUP / "memory.current").read_text())
        statistics = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        free = min(free, limit - used + int(statistics.get("inactive_file", 0)))
    return max(0, free)


def _free_on_gpu() -> tuple[int, int]:
    """Free and total, asked of the driver: no context of our own, which would take memory itself."""
    from vllm.third_party import pynvml

    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    pynvml.nvmlInit()
    memory = pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(int(first) if first.isdigit() else 0))
    return int(memory.free), int(memory.total)
