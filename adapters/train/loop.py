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
from adapters.train import adalora
from adapters.train.between_steps import BetweenSteps
from adapters.train.journal import Journal, Step
from adapters.train.labels import IGNORED, Example
from adapters.train.model import Batch, collate, loss_sum, trainable
from adapters.train.schedule import learning_rate
from adapters.train.sections import TrainingSection
from adapters.train.state import TrainingState


def run_steps(
    state: TrainingState,
    examples: Sequence[Example],
    pad: int,
    section: TrainingSection,
    journal: Journal,
    between: BetweenSteps,
) -> None:
    """From the step that `state` is at until that is enough."""
    model, optimizer, parameters = state.model, state.optimizer, trainable(state.model)
    batches = batches_forever(examples, section, pad, skip=state.step * section.gradient_accumulation_steps)
    model.train()
    while not between.ended:
        begun = time.perf_counter()
        number = state.step + 1
        rate = learning_rate(number, section, state.total)
        for group in optimizer.param_groups:
            group["lr"] = rate
        step_batches = [next(batches) for _ in range(section.gradient_accumulation_steps)]
        loss = backward(model, step_batches)
        adalora.add_orthogonality(model)
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, section.max_grad_norm))
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise Diverged(
                f"step {number}: the loss is {loss} and the gradient norm {norm}; lower training.learning_rate "
                f"(now {section.learning_rate}) or look for broken rows in the data"
            )
        optimizer.step()
        adalora.reallocate(model, number)
        optimizer.zero_grad(set_to_none=True)
        state.step = number
        tokens = sum(batch.tokens for batch in step_batches)
        journal.record(Step(number, loss, norm, rate, tokens, time.perf_counter() - begun))
        between.after_step()


def backward(model: Any, batches: Sequence[Batch]) -> float:
    """Gradients of the mean loss over the trained tokens of all batches: a token counts the same in each."""
    count = sum(int(torch.count_nonzero(batch.labels[:, 1:] != IGNORED)) for batch in batches)
    total = 0.0
    for batch in batches:
        loss = loss_sum(model, batch) / count
        loss.backward()
        total += loss.item()
    return total


def batches_forever(
    examples: Sequence[Example], section: TrainingSection, pad: int, *, skip: int = 0
) -> Iterator[Batch]:
    """Epoch after epoch, each in a seeded order of its own; the first `skip` batches are passed over."""
    order, shuffler = list(examples), random.Random(section.seed)
    size = section.per_device_train_batch_size
    starts = range(0, len(order), size)
    for _ in range(skip // len(starts)):
        shuffler.shuffle(order)
    skip %= len(starts)
    while True:
        shuffler.shuffle(order)
        for start in starts[skip:]:
            yield collate(order[start : start + size], pad)
        skip = 0
