"""The optimizer of a run, by the name that transformers gives it; refused where it would not do what it says.

It knows nothing of models: it gets parameters and sees from them where they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from adapters.errors import ConfigError
from adapters.train.sections import TrainingSection

PAGED = "paged_adamw_8bit"


def make_optimizer(
    parameters: Sequence[torch.nn.Parameter], section: TrainingSection, *, quantized: bool
) -> torch.optim.Optimizer:
    device = parameters[0].device.type
    name = resolved(section.optim, device, quantized=quantized)
    keywords = {"lr": section.learning_rate, "weight_decay": section.weight_decay}
    if name == "adamw_torch":
        return torch.optim.AdamW(parameters, fused=device == "cuda", **keywords)
    if name == PAGED and device != "cuda":
        raise ConfigError(
            f"training.optim: {PAGED} moves its state between a GPU and main memory, and this run is on a {device}; "
            "use adamw_8bit, which computes the same, or adamw_torch, which is the fastest on a CPU"
        )
    import bitsandbytes

    kinds = {
        "adamw_8bit": bitsandbytes.optim.AdamW8bit,
        PAGED: bitsandbytes.optim.PagedAdamW8bit,
        "lion_8bit": bitsandbytes.optim.Lion8bit,
    }
    optimizer: torch.optim.Optimizer = kinds[name](parameters, **keywords)
    return optimizer


def resolved(name: str, device: str, *, quantized: bool) -> str:
    """`auto`: what saves GPU memory where weights were quantised to save it; on a CPU 8 bits only cost time."""
    if name != "auto":
        return name
    return PAGED if device == "cuda" and quantized else "adamw_torch"
