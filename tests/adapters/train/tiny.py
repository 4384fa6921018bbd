"""A random llama of two layers and 128 tokens, on disk; what is trained on it in milliseconds, and what comes out."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch

from adapters.train import adalora, methods, model
from adapters.train.between_steps import BetweenSteps
from adapters.train.config import TrainConfig
from adapters.train.evaluate import Losses
from adapters.train.journal import Journal
from adapters.train.labels import IGNORED, Example
from adapters.train.loop import run_steps
from adapters.train.low_rank import use_low_rank_products
from adapters.train.method_sections import PeftSection
from adapters.train.optimizers import make_optimizer
from adapters.train.sections import ModelSection, QuantizationSection
from adapters.train.state import TrainingState
from adapters.train.stop import StopRequest

VOCABULARY = 128
STEPS = 12
NF4 = QuantizationSection()
PLAIN = QuantizationSection(load_in_4bit=False)


def save_base(path: Path) -> Path:
    """Every width is a multiple of the NF4 block."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.1,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def base_of(path: Path, quantization: QuantizationSection = NF4) -> Any:
    return model.load_base(ModelSection(model_name_or_path=path, dtype="float32"), quantization)


def examples(count: int = 8) -> list[Example]:
    """Of various lengths; what is said depends on what was asked."""
    draw = random.Random(0)
    rows = []
    for _ in range(count):
        asked = [draw.randrange(3, 60) for _ in range(draw.randrange(3, 9))]
        said = [60 + token for token in asked[:4]]
        rows.append(Example(ids=(*asked, *said), labels=(*[IGNORED] * len(asked), *said), truncated=False))
    return rows


def one_batch() -> model.Batch:
    return model.collate(examples(), 0)


@dataclass
class Run:
    model: Any
    losses: list[float]


def attached(base: Path, section: PeftSection, quantization: QuantizationSection = NF4, steps: int = STEPS) -> Any:
    loaded = base_of(base, quantization)
    section = section.resolved(methods.parameter_count(loaded))
    torch.manual_seed(0)
    adapted = methods.attach(loaded, section, steps, base)
    use_low_rank_products(adapted)
    return adapted


def run(
    base: Path, scratch: Path, section: PeftSection, quantization: QuantizationSection = NF4, **training: Any
) -> Run:
    fields = {"max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 2e-2, "warmup_steps": 1}
    config = config_of(base, scratch, fields | training)
    adapted = attached(base, section, quantization)
    parameters = model.trainable(adapted)
    optimizer = make_optimizer(parameters, config.training, quantized=False)
    state = TrainingState(adapted, optimizer, config.training.max_steps or STEPS)
    with Journal(Path(mkdtemp(dir=scratch)), "tiny", state.total) as journal:
        between = BetweenSteps(config, state, journal, lambda: Losses(0.0, None), lambda: None, StopRequest())
        run_steps(state, examples(), 0, config.training, journal, between)
    adalora.settle(adapted)
    return Run(adapted, [step.loss for step in journal.steps])


def config_of(base: Path, scratch: Path, training: dict[str, Any]) -> TrainConfig:
    """Steps and nothing between them."""
    return TrainConfig.model_validate(
        {
            "model": {"model_name_or_path": base},
            "data": {"train": [scratch / "nothing"]},
            "training": training,
            "eval": {"eval_steps": "never"},
            "output": {"output_dir": scratch / "out", "name": "tiny", "save_steps": "never"},
        }
    )


def log_probabilities(any_model: Any) -> torch.Tensor:
    batch = one_batch()
    any_model.eval()
    with torch.no_grad():
        logits = any_model(input_ids=batch.ids, attention_mask=batch.mask).logits
    any_model.train()
    return torch.log_softmax(logits[batch.mask.bool()].float(), dim=-1)
