"""The optimisation loop: batches in a seeded order, gradients of a mean over tokens, one optimizer step after another.

It knows nothing of files, of how a model was made or of what is done with it.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from adapters.errors import Diverged
from adapters.train.journal import Journal, Step
from adapters.train.labels import IGNORED, Example
from adapters.train.model import Batch, collate, loss_sum, trainable
from adapters.train.sections import TrainingSection


def run_steps(model: Any, examples: Sequence[Example], pad: int, section: TrainingSection, journal: Journal) -> None:
    parameters = trainable(model)
    optimizer = torch.optim.AdamW(parameters, lr=section.learning_rate, weight_decay=section.weight_decay)
    batches = batches_forever(examples, section, pad)
    model.train()
    for number in range(1, section.max_steps + 1):
        begun = time.perf_counter()
        rate = learning_rate(number, section)
        for group in optimizer.param_groups:
            group["lr"] = rate
        step_batches = [next(batches) for _ in range(section.gradient_accumulation_steps)]
        loss = backward(model, step_batches)
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, section.max_grad_norm))
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise Diverged(
                f"step {number}: the loss is {loss} and the gradient norm {norm}; lower training.learning_rate "
                f"(now {section.learning_rate}) or look for broken rows in the data"
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tokens = sum(batch.tokens for batch in step_batches)
        journal.record(Step(number, loss, norm, rate, tokens, time.perf_counter() - begun))


def backward(model: Any, batches: Sequence[Batch]) -> float:
    """Gradients of the mean loss over the trained tokens of all batches: a token counts the same in each."""
    count = sum(int(torch.count_nonzero(batch.labels[:, 1:] != IGNORED)) for batch in batches)
    total = 0.0
    for batch in batches:
        loss = loss_sum(model, batch) / count
        loss.backward()
        total += loss.item()
    return total


def batches_forever(examples: Sequence[Example], section: TrainingSection, pad: int) -> Iterator[Batch]:
    """Epoch after epoch, each in a seeded order of its own."""
    order, shuffler = list(examples), random.Random(section.seed)
    size = section.per_device_train_batch_size
    while True:
        shuffler.shuffle(order)
        for start in range(0, len(order), size):
            yield collate(order[start : start + size], pad)


def learning_rate(step: int, section: TrainingSection) -> float:
    """Linear up over `warmup_steps`, then a cosine down to a tenth at the last step."""
    if step <= section.warmup_steps:
        return section.learning_rate * step / section.warmup_steps
    part = (step - section.warmup_steps) / max(1, section.max_steps - section.warmup_steps)
    return section.learning_rate * (0.55 + 0.45 * math.cos(math.pi * part))
