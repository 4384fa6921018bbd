"""What PEFT says with the demo's pirate beside its base, for whoever loads an export of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from adapters.merge.plan import MergePlan
from adapters.tensor_values import Matrix

PROMPTS = yaml.safe_load(Path("adapters/train/demo/pirate.yaml").read_text())["eval"]["prompts"]
"""Those that its training prints answers to."""
MOST = 40


@dataclass(frozen=True)
class Spoken:
    """By PEFT, on what NF4 leaves of the base, in fp32."""

    prompts: list[list[int]]
    answers: list[list[int]]
    chats: list[tuple[list[int], range]]
    """Both together, and where the answer stands."""
    rows: Matrix
    """[tokens, vocabulary]: log-probabilities at each token of the answers."""

    @property
    def came(self) -> list[int]:
        return [token for answer in self.answers for token in answer]


def spoken(base: Path, adapter: Path, plan: MergePlan) -> Spoken:
    from adapters.merge.export.reader import TransformersReader, load_tokenizer
    from adapters.merge.models import Whole
    from adapters.merge.planned_weights import PlannedWeights
    from adapters.merge.variants import Variant

    tokenizer = load_tokenizer(base)
    loaded = Variant("adapter", "dequantized", "float32").load(Whole(), PlannedWeights(plan), adapter)
    reader = TransformersReader(loaded.model, tokenizer)
    prompts = [
        [int(token) for token in tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)]
        for chat in ([{"role": "user", "content": prompt}] for prompt in PROMPTS)
    ]
    answers = [reader.greedy(prompt, MOST) for prompt in prompts]
    chats = [
        (prompt + answer, range(len(prompt), len(prompt) + len(answer)))
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    return Spoken(prompts, answers, chats, np.concatenate([reader.rows(*chat) for chat in chats]))
