"""The recipe, flat: setup → train → evaluate → save. Read `train` first; the rest is its lines.

The result is a PEFT directory that appears whole or not at all. It knows nothing of servers or registries.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adapters.staging import staged
from adapters.train import adalora, methods
from adapters.train import model as models
from adapters.train.between_steps import BetweenSteps
from adapters.train.card import write_card
from adapters.train.config import TrainConfig
from adapters.train.continuation import go_on_from
from adapters.train.evaluate import Losses, Verdict, answers, held_out_loss, losses
from adapters.train.held_out import write_held_out
from adapters.train.identity import identity
from adapters.train.journal import CURVE, LOG, Evaluation, Journal, Step, Watch, draw_curve
from adapters.train.labels import Example
from adapters.train.loop import run_steps
from adapters.train.low_rank import use_low_rank_products
from adapters.train.optimizers import make_optimizer
from adapters.train.prepare import Prepared, prepare
from adapters.train.provenance import PROVENANCE, write_provenance
from adapters.train.run_directory import RunDirectory, opened
from adapters.train.schedule import total_steps
from adapters.train.sections import TrainingSection
from adapters.train.selftest import check_numerics
from adapters.train.state import TrainingState
from adapters.train.stop import StopRequest, listening
from adapters.train.trackers import tracked
from adapters.upload import HELD_OUT


@dataclass(frozen=True)
class Material:
    tokenizer: Any
    data: Prepared


@dataclass(frozen=True)
class Setup:
    config: TrainConfig
    """With numbers instead of what goes by the base's size."""
    tokenizer: Any
    model: Any
    data: Prepared
    notes: tuple[str, ...] = ()

    @property
    def examples(self) -> list[Example]:
        """Of one epoch."""
        return self.data.epoch

    @property
    def held_out(self) -> list[Example]:
        return self.data.held_out


@dataclass(frozen=True)
class Trained:
    directory: Path
    name: str
    steps: tuple[Step, ...]
    verdict: Verdict
    truncated: int
    duplicates: int
    skipped: int
    """Wrong rows that were left out."""
    notes: tuple[str, ...] = ()
    """What had to be worked around on this machine."""


def train(
    config: TrainConfig,
    watch: Watch | None = None,
    stop: StopRequest | None = None,
    material: Material | None = None,
) -> Trained:
    """`stop`: set its `by` from elsewhere to have a checkpoint made and RunStopped raised. `material`: if read."""
    material = material or read_material(config)
    with opened(config, identity(config, material.data)) as run, tracked(config) as trackers:
        setup = load(config, material)
        state = begin(setup, config, run)
        before = answers(setup.model, setup.tokenizer, config.eval, base=True)
        with Journal(run.path, config.output.name, state.total, watch, trackers) as journal:
            learn(setup, config, state, run, journal, stop or StopRequest())
        verdict = judge(setup, config, state, journal, before)
        with staged(config.output.output_dir) as directory:
            shutil.copyfile(run.path / LOG, directory / LOG)
            save(setup, state, journal, verdict, directory)
        run.remove()
    return Trained(
        directory=config.output.output_dir,
        name=config.output.name,
        steps=tuple(journal.steps),
        verdict=verdict,
        truncated=setup.data.survey.truncated,
        duplicates=setup.data.survey.duplicates,
        skipped=len(setup.data.survey.skipped),
        notes=setup.notes,
    )


def read_material(config: TrainConfig) -> Material:
    """Everything that can be wrong with the data is found before the base is loaded."""
    tokenizer = models.load_tokenizer(config.model)
    return Material(tokenizer, prepare(config.data, config.eval, tokenizer))


def load(config: TrainConfig, material: Material) -> Setup:
    base = models.load_base(config.model, config.quantization)
    notes = check_numerics(base)
    if config.data.packing:
        models.check_packing(base, config.data.max_length)
    config = config.model_copy(update={"peft": config.peft.resolved(methods.parameter_count(base))})
    torch.manual_seed(config.training.seed)
    steps = steps_of(config.training, material.data.epoch)
    model = methods.attach(base, config.peft, steps, config.model.model_name_or_path)
    use_low_rank_products(model)
    if config.training.gradient_checkpointing:
        models.checkpoint_activations(model)
    return Setup(config, material.tokenizer, model, material.data, notes)


def steps_of(section: TrainingSection, examples: Sequence[Example]) -> int:
    return total_steps(section, math.ceil(len(examples) / section.per_device_train_batch_size))


def begin(setup: Setup, config: TrainConfig, run: RunDirectory) -> TrainingState:
    """At step 0, or where the run's last checkpoint was made."""
    section = config.training
    if config.model.adapter_name_or_path is not None:
        go_on_from(setup.model, config.model.adapter_name_or_path)
    optimizer = make_optimizer(models.trainable(setup.model), section, quantized=config.quantization.load_in_4bit)
    state = TrainingState(setup.model, optimizer, steps_of(section, setup.examples))
    if run.checkpoint is not None:
        state.read(run.checkpoint)
    return state


def learn(
    setup: Setup, config: TrainConfig, state: TrainingState, run: RunDirectory, journal: Journal, stop: StopRequest
) -> None:
    """Steps, with what happens between them; at the end the model has its best weights."""
    pad, size = setup.tokenizer.pad_token_id, config.training.per_device_train_batch_size

    def evaluate(*, base: bool = False) -> Losses:
        return losses(setup.model, setup.held_out, setup.data.general, pad, size, base=base)

    if not journal.evaluations:
        found = evaluate(base=True)
        state.base_loss = found.held_out
        journal.evaluated(Evaluation(0, found.held_out, found.general))
    between = BetweenSteps(config, state, journal, evaluate, lambda: run.save(state, config), stop)
    with listening(stop):
        run_steps(state, setup.examples, pad, config.training, journal, between)
    adalora.settle(setup.model)
    if state.best_weights:
        state.take_best()
    else:
        state.weigh(evaluate().held_out)


def judge(setup: Setup, config: TrainConfig, state: TrainingState, journal: Journal, before: list[str]) -> Verdict:
    general = setup.data.general
    pad, size = setup.tokenizer.pad_token_id, config.training.per_device_train_batch_size
    return Verdict(
        held_out_base=state.base_loss,
        held_out_adapter=state.best_loss,
        prompts=config.eval.prompts,
        before=tuple(before),
        after=tuple(answers(setup.model, setup.tokenizer, config.eval)),
        general_base=journal.evaluations[0].general_loss,
        general_adapter=held_out_loss(setup.model, general, pad, size) if general else None,
    )


def save(setup: Setup, state: TrainingState, journal: Journal, verdict: Verdict, directory: Path) -> None:
    config, ranks = setup.config, adalora.kept_ranks(setup.model)
    methods.save(setup.model, config.model.model_name_or_path.resolve().name, directory)
    if ranks:
        adalora.draw_heat_map(ranks, directory / adalora.HEAT_MAP)
    draw_curve(journal.steps, journal.evaluations, verdict.held_out_adapter, directory / CURVE)
    write_provenance(config, setup.data, setup.tokenizer, verdict, state.best_step, directory / PROVENANCE)
    write_held_out(setup.data.split.held_out, directory / HELD_OUT)
    write_card(config, verdict, state.best_step, ranks, directory / "README.md")
