"""The recipe, flat: setup → train → evaluate → save. Read `train` first; the rest is its lines.

The result is a PEFT directory that appears whole or not at all. It knows nothing of servers or registries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adapters.staging import staged
from adapters.train import model as models
from adapters.train.card import write_card
from adapters.train.config import TrainConfig
from adapters.train.data import Split, read_conversations, split_by_hash
from adapters.train.evaluate import Verdict, answers, held_out_loss
from adapters.train.journal import CURVE, Journal, Step, Watch, draw_curve
from adapters.train.labels import Example, encode_all
from adapters.train.loop import run_steps
from adapters.train.provenance import PROVENANCE, write_provenance


@dataclass(frozen=True)
class Setup:
    tokenizer: Any
    model: Any
    split: Split
    examples: list[Example]
    held_out: list[Example]


@dataclass(frozen=True)
class Trained:
    directory: Path
    name: str
    steps: tuple[Step, ...]
    verdict: Verdict
    truncated: int
    duplicates: int


def train(config: TrainConfig, watch: Watch | None = None) -> Trained:
    setup = set_up(config)
    with staged(config.output.output_dir) as directory:
        before = answers(setup.model, setup.tokenizer, config.eval, base=True)
        with Journal(directory, config.output.name, config.training.max_steps, watch) as journal:
            run_steps(setup.model, setup.examples, setup.tokenizer.pad_token_id, config.training, journal)
        verdict = judge(setup, config, before)
        save(setup, config, journal.steps, verdict, directory)
    truncated = sum(example.truncated for example in setup.examples + setup.held_out)
    return Trained(
        directory=config.output.output_dir,
        name=config.output.name,
        steps=tuple(journal.steps),
        verdict=verdict,
        truncated=truncated,
        duplicates=setup.split.duplicates,
    )


def set_up(config: TrainConfig) -> Setup:
    """Everything that can be wrong with the data is found before the base is loaded."""
    split = split_by_hash(read_conversations(config.data.train), config.data.eval_split)
    tokenizer = models.load_tokenizer(config.model)
    examples = encode_all(split.train, tokenizer, config.data.max_length)
    held_out = encode_all(split.held_out, tokenizer, config.data.max_length)
    base = models.load_base(config.model, config.quantization)
    torch.manual_seed(config.training.seed)
    return Setup(tokenizer, models.attach_lora(base, config.peft), split, examples, held_out)


def judge(setup: Setup, config: TrainConfig, before: list[str]) -> Verdict:
    pad, size = setup.tokenizer.pad_token_id, config.training.per_device_train_batch_size
    return Verdict(
        held_out_base=held_out_loss(setup.model, setup.held_out, pad, size, base=True),
        held_out_adapter=held_out_loss(setup.model, setup.held_out, pad, size),
        prompts=config.eval.prompts,
        before=tuple(before),
        after=tuple(answers(setup.model, setup.tokenizer, config.eval)),
    )


def save(setup: Setup, config: TrainConfig, steps: Sequence[Step], verdict: Verdict, directory: Path) -> None:
    setup.model.peft_config["default"].base_model_name_or_path = config.model.model_name_or_path.resolve().name
    setup.model.save_pretrained(directory, save_embedding_layers=False)  # `auto` would ask a model hub
    draw_curve(steps, verdict.held_out_adapter, verdict.held_out_base, directory / CURVE)
    write_provenance(config, setup.split, setup.tokenizer, verdict, directory / PROVENANCE)
    write_card(config, verdict, directory / "README.md")
