"""When things happen in a run: how many steps it has, the learning rate of each, when it is evaluated and saved.

Pure arithmetic on the configuration and the number of examples; it knows nothing of torch.
"""

from __future__ import annotations

import math
from typing import Literal

from adapters.train.sections import TrainingSection

Cadence = int | Literal["auto", "never"]
FLOOR = 0.1
"""What a cosine ends at, as a share of the learning rate: a last step of nothing at all would be a step wasted."""


def total_steps(section: TrainingSection, batches_per_epoch: int) -> int:
    """Optimizer steps; a part of a step at the end of the last epoch is a step."""
    if section.max_steps is not None:
        return section.max_steps
    return math.ceil(section.num_train_epochs * batches_per_epoch / section.gradient_accumulation_steps)


def warmup_steps(section: TrainingSection, total: int) -> int:
    """A number below one is a share of the run."""
    return math.ceil(section.warmup_steps * total) if section.warmup_steps < 1 else int(section.warmup_steps)


def learning_rate(step: int, section: TrainingSection, total: int) -> float:
    """Linear up over the warm-up; then as `lr_scheduler_type` says, until step `total`."""
    warmup = warmup_steps(section, total)
    if step <= warmup:
        return section.learning_rate * step / warmup
    part = (step - warmup) / max(1, total - warmup)
    if section.lr_scheduler_type == "constant":
        return section.learning_rate
    if section.lr_scheduler_type == "linear":
        return section.learning_rate * (1 - (1 - FLOOR) * part)
    return section.learning_rate * (FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * part)) / 2)


def due(step: int, every: Cadence, total: int) -> bool:
    """Whether something that happens `every` so many steps happens after this one; the last step always counts.

    `auto` is 4 times in a short run and 20 times in one of 500 steps or more.
    """
    if every == "never":
        return False
    interval = math.ceil(total / min(20, max(4, total // 25))) if every == "auto" else every
    return step % interval == 0 or step == total
