"""Slow: a step computes with as many threads as the process has, however little there is to compute.

Between two operators all threads wait for the last one. In a decode step of a small model that is every 20 µs, and
where a neighbour has taken one core for a while, the others stand still: measured three times as slow as on one core.

Faster: a short step uses as many threads as `LORAPLEX_STEP_THREADS` says, a long one all. Long is what takes one core
some 20 ms: then the second core is worth more than the waiting costs, and a neighbour delays it by its own share only.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from server.vllm_plugin.patches import Patch

if TYPE_CHECKING:
    import torch

SHORT_STEP_THREADS = "LORAPLEX_STEP_THREADS"
LONG_STEP = 2e9
"""Multiplications with a weight (tokens * weights) from which on a step is long."""
LEAST_TOKENS = 3
"""Fewer take as long: the weights must come from memory all the same."""


def load_model(stock: Callable[..., Any]) -> Callable[..., Any]:
    def load_model(self: Any, *arguments: Any, **more: Any) -> Any:
        loaded = stock(self, *arguments, **more)
        self.step_threads = StepThreads.of_environment(count_weights(self.model))
        return loaded

    return load_model


def execute_model(stock: Callable[..., Any]) -> Callable[..., Any]:
    def execute_model(self: Any, scheduler_output: Any, *arguments: Any, **more: Any) -> Any:
        self.step_threads.use_for(scheduler_output.total_num_scheduled_tokens)
        return stock(self, scheduler_output, *arguments, **more)

    return execute_model


@dataclass
class StepThreads:
    """How many threads a step of a model with so many weights is computed with."""

    few: int
    most: int
    weights: int
    used: int

    @classmethod
    def of_environment(cls, weights: int) -> StepThreads:
        """Without `OMP_NUM_THREADS` it is somebody else who decides: nothing is ever changed."""
        most = int(os.environ.get("OMP_NUM_THREADS", 1))
        return cls(min(most, int(os.environ.get(SHORT_STEP_THREADS, most))), most, weights, most)

    def use_for(self, tokens: int) -> None:
        """Where few are as many as most, torch is not even asked how many it uses: having been asked, it computes small
        fp32 products with all of them, and a step with adapters takes a third longer."""
        wanted = self.most if max(LEAST_TOKENS, tokens) * self.weights >= LONG_STEP else self.few
        if wanted != self.used:
            import torch

            torch._C.set_num_threads(wanted)  # torch.set_num_threads is replaced by a warning in vLLM's worker
            self.used = wanted


def count_weights(model: torch.nn.Module) -> int:
    """Of all matrices; in 4 bits two are a byte."""
    import torch

    packed = [module.packed_nf4.codes for module in model.modules() if hasattr(module, "packed_nf4")]
    matrices = [*packed, *(parameter for parameter in model.parameters() if parameter.dim() > 1)]
    return sum(int(each.numel()) * (2 if each.dtype == torch.uint8 else 1) for each in matrices)


def physical_cores() -> int:
    """How many cores this process may use; two threads that share one count once. Linux tells, else every thread."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return len({_siblings(cpu) for cpu in allowed})


def _siblings(cpu: int) -> str:
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text()
    except OSError:
        return str(cpu)


RUNNER = "vllm.v1.worker.cpu_model_runner:CPUModelRunner"

PATCHES = (
    Patch(RUNNER, "load_model", ("self", "load_dummy_weights"), load_model),
    Patch(RUNNER, "execute_model", ("self", "scheduler_output", "intermediate_tensors"), execute_model),
)
